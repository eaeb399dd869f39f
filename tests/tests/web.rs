//! The web through the ambassador: large uploads and downloads with curl and nginx, and a WebSocket,
//! which is long-lived and talks both ways.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use ambassador_tests::address::Family;
use ambassador_tests::noise::Noise;
use ambassador_tests::peer::Peer;
use ambassador_tests::pod;
use ambassador_tests::process::{Process, run};
use ambassador_tests::server::nginx::Nginx;
use ambassador_tests::wait::until;
use ambassador_tests::way::{Road, Way};

const LARGE: usize = 64 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

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
    fs::write(&original, Noise::new(1).bytes(LARGE)).context("write a large file")?;
    let expected = digest(&original)?;

    for way in Way::all()? {
        let road = Road::to(&address.into(), way, &pod.inside, Family::Tcp)?;
        let url = format!("http://{}/{way}", road.address);
        let curl = |arguments: &[&Path]| {
            let mut command = pod.inside.command("curl");
            command.args(["--silent", "--show-error", "--fail", "--noproxy", "*"]);
            run(command.args(arguments).arg(&url), PATIENCE).with_context(|| format!("by {way}"))
        };
        curl(&[Path::new("--upload-file"), &original])?;
        let uploaded = digest(&nginx.directory().join(way.to_string()))?;
        ensure!(uploaded == expected, "the upload by {way} is not what was sent");
        curl(&[Path::new("--output"), &returned])?;
        ensure!(digest(&returned)? == expected, "the download by {way} is not what was stored");
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
        upgrade(&client)?;
        let mut noise = Noise::new(2);
        for round in 0..200 {
            let length = noise.below(1 << (round % 18)) as usize;
            let message = noise.bytes(length);
            frame(&client, BINARY, &message)?;
            let (opcode, echoed) = hear_frame(&client)?;
            ensure!(opcode == BINARY && echoed == message, "by {way}: message {round} changed");
        }
        frame(&client, CLOSE, &1000_u16.to_be_bytes())?;
        ensure!(hear_frame(&client)? == (CLOSE, 1000_u16.to_be_bytes().to_vec()));
        client.hear_end().with_context(|| format!("by {way}"))?;
    }
    Ok(())
}

const BINARY: u8 = 0x2;
const CLOSE: u8 = 0x8;

/// With the key and the answer of RFC 6455's own example.
fn upgrade(client: &Peer) -> Result<()> {
    client.say(
        b"GET / HTTP/1.1\r\nHost: echo\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
          Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
    )?;
    let expected = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
                    Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";
    let answer = client.hear(expected.len())?;
    ensure!(answer == expected.as_bytes(), "upgrade: {}", String::from_utf8_lossy(&answer));
    Ok(())
}

/// A client's frame, masked as the protocol demands.
fn frame(client: &Peer, opcode: u8, payload: &[u8]) -> Result<()> {
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
    client.say(&frame)
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
