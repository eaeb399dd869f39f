//! The web through the ambassador: large uploads and downloads and connections that are kept, with curl
//! and nginx; and a WebSocket, which is long-lived and talks both ways.
//!
//! The large files are of 64 MiB; with `AMBASSADOR_TORTURE=full`, of 1 GiB.

use std::fs;
use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use ambassador_tests::address::Family;
use ambassador_tests::noise::Noise;
use ambassador_tests::peer::Peer;
use ambassador_tests::place::Place;
use ambassador_tests::pod;
use ambassador_tests::process::{Process, run};
use ambassador_tests::server::nginx::Nginx;
use ambassador_tests::wait::until;
use ambassador_tests::way::{Bytes, Road, Way};

const PATIENCE: Duration = Duration::from_secs(120);

#[test]
fn large_files_go_both_ways_intact() -> Result<()> {
    let pod = pod!("nginx", "curl", "sha256sum");
    let address = SocketAddr::from((pod.upstream.ipv4, pod.upstream.port()?));
    let configuration = format!(
        "events {{}}
         http {{
             access_log off;
             client_max_body_size 0;
             server {{
                 listen {address};
                 root DIRECTORY;
                 dav_methods PUT;
                 client_body_temp_path DIRECTORY/incoming;
             }}
         }}
         user root;"
    );
    let nginx = Nginx::start(&pod.upstream, &configuration, &address.into())?;
    let directory = tempfile::tempdir().context("create a directory for files")?;
    let (original, returned) = (directory.path().join("original"), directory.path().join("back"));
    let full = std::env::var_os("AMBASSADOR_TORTURE").is_some_and(|extent| extent == "full");
    let length = if full { 1 << 30 } else { 64 << 20 };
    let (mut file, mut noise) = (fs::File::create(&original)?, Noise::new(1));
    for _ in 0..length >> 20 {
        file.write_all(&noise.bytes(1 << 20)).context("write a large file")?;
    }
    let expected = digest(&original)?;

    for way in Way::all()? {
        let road = Road::to(&address.into(), way, &pod.inside, Family::Tcp)?;
        let url = format!("http://{}/{way}", road.address);
        let fetch = |arguments: &[&Path]| {
            let mut command = curl(&pod.inside);
            run(command.args(arguments).arg(&url), PATIENCE).with_context(|| format!("by {way}"))
        };
        let mut answers = fetch(&[Path::new("--upload-file"), &original])?;
        let uploaded = nginx.directory().join(way.to_string());
        ensure!(digest(&uploaded)? == expected, "the upload by {way} is not what was sent");
        answers += &fetch(&[Path::new("--output"), &returned])?;
        ensure!(digest(&returned)? == expected, "the download by {way} is not what was stored");
        let (connections, bytes) = told(&answers)?;
        road.has_carried(connections, Some(bytes))?;
        fs::remove_file(&uploaded).context("remove a large file")?;
    }
    Ok(())
}

#[test]
fn kept_connections_carry_many_requests() -> Result<()> {
    const REQUESTS: usize = 200;
    let pod = pod!("nginx", "curl");
    let address = SocketAddr::from((pod.upstream.ipv4, pod.upstream.port()?));
    let configuration = format!(
        "events {{}}
         http {{
             access_log off;
             keepalive_requests {REQUESTS};
             server {{ listen {address}; location / {{ return 200 $request_uri; }} }}
         }}"
    );
    let _nginx = Nginx::start(&pod.upstream, &configuration, &address.into())?;
    for way in Way::all()? {
        let road = Road::to(&address.into(), way, &pod.inside, Family::Tcp)?;
        let answer = run(
            curl(&pod.inside)
                .args(["--http1.1", &format!("http://{}/[1-{REQUESTS}]", road.address)]),
            PATIENCE,
        )
        .with_context(|| format!("by {way}"))?;
        let pages = answer.lines().map(|line| line.split(' ').next().unwrap_or_default());
        ensure!(
            pages.eq((1..=REQUESTS).map(|request| format!("/{request}"))),
            "by {way}: pages are wrong or missing: {answer}"
        );
        let (connections, bytes) = told(&answer)?;
        ensure!(connections == 1, "by {way}: it took {connections} connections");
        road.has_carried(1, Some(bytes))?;
    }
    Ok(())
}

#[test]
fn websockets_stay_open_and_talk_both_ways() -> Result<()> {
    let pod = pod!("python3");
    let address = SocketAddr::from((pod.upstream.ipv4, pod.upstream.port()?));
    let mut server = Process::start(
        pod.upstream
            .command("python3")
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/web/websocket_echo.py"))
            .args([address.ip().to_string(), address.port().to_string()]),
    )?;
    until("the WebSocket server", PATIENCE, || {
        server.still_runs()?;
        let address = ambassador_tests::address::Address::from(address);
        Ok(pod.inside.enter(|| address.connect()).ok())
    })?;

    for way in Way::all()? {
        let road = Road::to(&address.into(), way, &pod.inside, Family::Tcp)?;
        let client = pod.inside.enter(|| road.address.connect())?;
        let mut bytes = upgrade(&client)?;
        let mut noise = Noise::new(2);
        for round in 0..200 {
            let length = noise.below(1 << (round % 18)) as usize;
            let message = noise.bytes(length);
            bytes += frame(&client, BINARY, &message)?;
            let (opcode, echoed) = hear_frame(&client)?;
            ensure!(opcode == BINARY && echoed == message, "by {way}: message {round} changed");
        }
        bytes += frame(&client, CLOSE, &1000_u16.to_be_bytes())?;
        ensure!(hear_frame(&client)? == (CLOSE, 1000_u16.to_be_bytes().to_vec()));
        client.hear_end().with_context(|| format!("by {way}"))?;
        drop(client);
        road.has_carried(1, Some(bytes))?;
    }
    Ok(())
}

/// curl, which follows each answer by its figures, on a line.
fn curl(place: &Place) -> Command {
    let figures =
        " %{num_connects} %{size_request} %{size_upload} %{size_header} %{size_download}\n";
    let mut curl = place.command("curl");
    curl.args(["--silent", "--show-error", "--fail", "--noproxy", "*", "--write-out", figures]);
    curl
}

/// How many connections curl made, and what it moved on them, as it tells.
fn told(answers: &str) -> Result<(u64, Bytes)> {
    let (mut connections, mut bytes) = (0, Bytes::default());
    for line in answers.lines() {
        let figures: Vec<u64> = line
            .split(' ')
            .skip(1)
            .map(str::parse)
            .collect::<Result<_, _>>()
            .with_context(|| format!("parse curl's figures in {line:?}"))?;
        let [connects, request, upload, header, download] = figures[..] else {
            bail!("there are not five figures in {line:?}");
        };
        connections += connects;
        bytes += Bytes { up: request + upload, down: header + download };
    }
    Ok((connections, bytes))
}

const BINARY: u8 = 0x2;
const CLOSE: u8 = 0x8;

/// With the key and the answer of RFC 6455's own example.
fn upgrade(client: &Peer) -> Result<Bytes> {
    let question = b"GET / HTTP/1.1\r\nHost: echo\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
          Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    client.say(question)?;
    let expected = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
                    Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";
    let answer = client.hear(expected.len())?;
    ensure!(answer == expected.as_bytes(), "upgrade: {}", String::from_utf8_lossy(&answer));
    Ok(Bytes { up: question.len() as u64, down: answer.len() as u64 })
}

/// A client's frame, masked as the protocol demands; returns what it takes there, and back without a mask.
fn frame(client: &Peer, opcode: u8, payload: &[u8]) -> Result<Bytes> {
    const MASK: [u8; 4] = [0x5a, 0xc3, 0x0f, 0x96];
    let mut frame = vec![0x80 | opcode];
    match payload.len() {
        short @ 0..126 => frame.push(0x80 | short as u8),
        medium @ 126..0x1_0000 => {
            frame.push(0x80 | 126);
            frame.extend((medium as u16).to_be_bytes());
        }
        long => {
            frame.push(0x80 | 127);
            frame.extend((long as u64).to_be_bytes());
        }
    }
    frame.extend(MASK);
    frame.extend(payload.iter().zip(MASK.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    client.say(&frame)?;
    let (up, mask) = (frame.len() as u64, MASK.len() as u64);
    Ok(Bytes { up, down: up - mask })
}

fn hear_frame(client: &Peer) -> Result<(u8, Vec<u8>)> {
    let head = client.hear(2)?;
    let length = match head[1] {
        126 => client.hear(2)?,
        127 => client.hear(8)?,
        short => vec![short],
    };
    let length = length.iter().fold(0, |length, byte| length << 8 | usize::from(*byte));
    Ok((head[0] & 0x0f, client.hear(length)?))
}

fn digest(file: &Path) -> Result<String> {
    let line = run(Command::new("sha256sum").arg(file), PATIENCE)?;
    line.split(' ').next().map(str::to_owned).context("find the digest")
}
