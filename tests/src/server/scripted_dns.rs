//! A name server that says what a test has it say, also what dnsmasq cannot be brought to: nothing, failures,
//! answers that do not fit a datagram, or come late, aliases that lead nowhere. It counts what it is asked.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::Duration;

use anyhow::{Context, Result};
use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, CNAME, SRV};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use hickory_proto::serialize::binary::BinEncodable;
use socket2::SockRef;

use crate::place::Place;

/// A running server; it is gone when dropped.
#[derive(Debug)]
pub struct ScriptedDns {
    script: Arc<Mutex<Script>>,
    udp: UdpSocket,
    tcp: TcpListener,
    threads: Vec<JoinHandle<()>>,
}

/// What it says to a question.
#[derive(Debug, Clone)]
pub enum Reply {
    /// These records; none is an answer too.
    Records(Vec<Record>),
    /// These answers, and addresses beside them.
    Beside(Vec<Record>, Vec<Record>),
    NoSuchName,
    Failure,
    Silence,
}

#[derive(Debug, Default)]
struct Script {
    replies: HashMap<(String, RecordType), Reply>,
    lags: HashMap<RecordType, Duration>,
    asked: Vec<Asked>,
    open: usize,
    most_open: usize,
}

#[derive(Debug)]
struct Asked {
    name: String,
    over_tcp: bool,
}

impl ScriptedDns {
    /// On port 53 of a place, knowing no name.
    pub fn start(place: &Place) -> Result<Self> {
        let at = SocketAddr::from((place.ipv4, 53));
        let bind = || Ok((UdpSocket::bind(at)?, TcpListener::bind(at)?));
        let (udp, tcp) = place.enter(bind).context("bind a name server")?;
        let script = Arc::new(Mutex::new(Script::default()));
        let datagrams = (udp.try_clone()?, Arc::clone(&script));
        let streams = (tcp.try_clone()?, Arc::clone(&script));
        let threads = vec![
            spawn(move || serve_datagrams(&datagrams.0, &datagrams.1)),
            spawn(move || serve_streams(&streams.0, &streams.1)),
        ];
        Ok(Self { script, udp, tcp, threads })
    }

    /// Says this from now on.
    pub fn says(&self, name: &str, kind: RecordType, reply: Reply) {
        lock(&self.script).replies.insert((name.to_owned(), kind), reply);
    }

    /// Says this of the addresses of both families from now on.
    pub fn says_of_addresses(&self, name: &str, reply: &Reply) {
        for kind in [RecordType::A, RecordType::AAAA] {
            self.says(name, kind, reply.clone());
        }
    }

    /// Knows these addresses of a name from now on, and no others.
    pub fn knows(&self, name: &str, ttl: u32, addresses: &[IpAddr]) -> Result<()> {
        let (v4, v6): (Vec<_>, Vec<_>) = addresses.iter().partition(|ip| ip.is_ipv4());
        for (kind, addresses) in [(RecordType::A, v4), (RecordType::AAAA, v6)] {
            let records = addresses.into_iter().map(|ip| address(name, ttl, ip));
            self.says(name, kind, Reply::Records(records.collect::<Result<_>>()?));
        }
        Ok(())
    }

    /// Takes so long for answers of this kind from now on.
    pub fn lags(&self, kind: RecordType, by: Duration) {
        lock(&self.script).lags.insert(kind, by);
    }

    /// How many questions were unanswered at the same time at the most.
    pub fn most_open(&self) -> usize {
        lock(&self.script).most_open
    }

    /// How often it was asked for a name.
    pub fn asked(&self, name: &str) -> usize {
        lock(&self.script).asked.iter().filter(|asked| asked.name == name).count()
    }

    /// How often it was asked for a name over TCP.
    pub fn asked_over_tcp(&self, name: &str) -> usize {
        let script = lock(&self.script);
        script.asked.iter().filter(|asked| asked.name == name && asked.over_tcp).count()
    }
}

/// A name's address.
pub fn address(name: &str, ttl: u32, ip: IpAddr) -> Result<Record> {
    record(
        name,
        ttl,
        match ip {
            IpAddr::V4(ip) => RData::A(A(ip)),
            IpAddr::V6(ip) => RData::AAAA(AAAA(ip)),
        },
    )
}

/// That a name is another.
pub fn alias(name: &str, ttl: u32, of: &str) -> Result<Record> {
    record(name, ttl, RData::CNAME(CNAME(Name::from_ascii(of).context("name an alias")?)))
}

/// That a service is at this port of a name.
pub fn service(name: &str, ttl: u32, priority: u16, port: u16, target: &str) -> Result<Record> {
    let target = Name::from_ascii(target).context("name a service's target")?;
    record(name, ttl, RData::SRV(SRV::new(priority, 1, port, target)))
}

fn record(name: &str, ttl: u32, data: RData) -> Result<Record> {
    Ok(Record::from_rdata(Name::from_ascii(name).context("name a record")?, ttl, data))
}

impl Script {
    /// What it says, and how late.
    fn reply(&mut self, question: &[u8], over_tcp: bool) -> Option<(Message, Duration)> {
        let asked = Message::from_vec(question).ok()?;
        let query = asked.queries.first()?;
        let name = query.name().to_ascii().trim_end_matches('.').to_ascii_lowercase();
        let reply = self.replies.get(&(name.clone(), query.query_type())).cloned();
        let lag = self.lags.get(&query.query_type()).copied().unwrap_or_default();
        self.asked.push(Asked { name, over_tcp });
        self.open += 1;
        self.most_open = self.most_open.max(self.open);
        let mut message = Message::response(asked.id, asked.op_code);
        message.metadata.recursion_desired = asked.recursion_desired;
        message.metadata.recursion_available = true;
        message.add_query(query.clone());
        match reply.unwrap_or(Reply::NoSuchName) {
            Reply::Records(records) => drop(message.add_answers(records)),
            Reply::Beside(answers, others) => {
                message.add_answers(answers).add_additionals(others);
            }
            Reply::NoSuchName => message.metadata.response_code = ResponseCode::NXDomain,
            Reply::Failure => message.metadata.response_code = ResponseCode::ServFail,
            Reply::Silence => return None,
        }
        Some((message, lag))
    }
}

fn serve_datagrams(socket: &UdpSocket, script: &Arc<Mutex<Script>>) {
    let mut question = [0; 4096];
    // The shutdown ends it, as of any socket.
    while let Ok((length, from)) = socket.recv_from(&mut question) {
        if length == 0 {
            return;
        }
        let reply = lock(script).reply(&question[..length], false);
        let Some((message, lag)) = reply else { continue };
        let Ok(mut bytes) = message.to_bytes() else { continue };
        let room = Message::from_vec(&question[..length]).map_or(512, |asked| asked.max_payload());
        if bytes.len() > usize::from(room) {
            let Ok(cut) = message.truncate().to_bytes() else { continue };
            bytes = cut;
        }
        let Ok(socket) = socket.try_clone() else { continue };
        let script = Arc::clone(script);
        let answer = move || {
            sleep(lag);
            lock(&script).open -= 1;
            // Whoever asked may be gone.
            let _ = socket.send_to(&bytes, from);
        };
        if lag.is_zero() {
            answer();
        } else {
            spawn(answer);
        }
    }
}

fn serve_streams(listener: &TcpListener, script: &Arc<Mutex<Script>>) {
    while let Ok((client, _)) = listener.accept() {
        let script = Arc::clone(script);
        // Ends with its client.
        spawn(move || serve_stream(client, &script));
    }
}

fn serve_stream(mut client: TcpStream, script: &Mutex<Script>) -> Result<()> {
    loop {
        let mut length = [0; 2];
        client.read_exact(&mut length)?;
        let mut question = vec![0; usize::from(u16::from_be_bytes(length))];
        client.read_exact(&mut question)?;
        let reply = lock(script).reply(&question, true);
        let Some((message, lag)) = reply else { continue };
        sleep(lag);
        lock(script).open -= 1;
        let bytes = message.to_bytes()?;
        client.write_all(&u16::try_from(bytes.len())?.to_be_bytes())?;
        client.write_all(&bytes)?;
    }
}

fn lock(script: &Mutex<Script>) -> MutexGuard<'_, Script> {
    script.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for ScriptedDns {
    fn drop(&mut self) {
        // It wakes accept(2), and recv(2) with nothing, though it says ENOTCONN of the latter.
        let _ = SockRef::from(&self.tcp).shutdown(std::net::Shutdown::Both);
        let _ = SockRef::from(&self.udp).shutdown(std::net::Shutdown::Both);
        for thread in self.threads.drain(..) {
            // It has nothing to report.
            let _ = thread.join();
        }
    }
}
