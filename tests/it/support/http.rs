//! Owns: a client of the agent's HTTP server that says exactly what it is told, over a socket of its own.
//! Does not own: what the answers should be.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use serde_json::Value;

use super::agent::Agent;
use super::process::eventually;
use super::rig::PATIENCE;

/// What was answered.
#[derive(Debug)]
pub struct Answer {
    pub code: u16,
    pub head: String,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// Where an agent with `http.listen = "127.0.0.1:0"` listens, as its log says.
pub fn address(agent: &mut Agent) -> SocketAddr {
    const WORDS: &str = "listening for /metrics";
    agent.wait_for_log(WORDS, PATIENCE);
    let log = agent.stderr();
    let line = log.lines().find(|line| line.contains(WORDS)).expect("it was just there");
    let (_, address) = line.rsplit_once("address=").expect("the line names its address");
    address.trim().parse().unwrap_or_else(|error| panic!("{error}: {line}"))
}

/// Sends these bytes and reads until the server closes; `None` when it answers nothing.
pub fn send(address: SocketAddr, request: &str) -> Option<Answer> {
    let mut stream = TcpStream::connect(address).expect("somebody listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout can be set");
    // It may have closed already.
    let _ = stream.write_all(request.as_bytes());
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    let text = String::from_utf8(bytes).expect("answers are text");
    let (head, body) = text.split_once("\r\n\r\n")?;
    let code = head.split(' ').nth(1)?.parse().ok()?;
    Some(Answer { code, head: head.to_lowercase(), body: body.to_string() })
}

/// `more`: header lines, each with its line end.
pub fn get_with(address: SocketAddr, path: &str, more: &str) -> Answer {
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n{more}\r\n");
    send(address, &request).expect("an answer")
}

pub fn get(address: SocketAddr, path: &str) -> Answer {
    get_with(address, path, "")
}

/// Waits until `/protected` answers with this code.
pub fn wait_protected(address: SocketAddr, code: u16) -> Value {
    eventually(PATIENCE, &format!("/protected answers {code}"), || {
        let answer = get(address, "/protected");
        (answer.code == code).then(|| answer.json())
    })
}

/// What `/status` says of a cluster.
pub fn status_of(address: SocketAddr, cluster: &str) -> Value {
    let answer = get(address, "/status").json();
    let clusters = answer["clusters"].as_array().expect("a list").iter();
    clusters.clone().find(|status| status["name"] == cluster).expect("it is served").clone()
}

/// A metric's value, by its name with all labels.
pub fn metric(metrics: &str, name: &str) -> Option<f64> {
    metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
}
