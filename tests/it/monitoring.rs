//! What a running agent says of itself over HTTP, on a real server.

use std::collections::BTreeSet;
use std::fs;
use std::net::{SocketAddr, TcpStream};

use seawall::telemetry::meters::{CATALOGUE, Kind};
use seawall::wal::Lsn;
use serde_json::Value;

use crate::support::agent::{self, Agent};
use crate::support::http::{self, get, get_with, metric, send, status_of, wait_protected};
use crate::support::postgres::{self, Server};
use crate::support::process::{self, eventually};
use crate::support::rig::{PATIENCE, Rig};

const HTTP: &str = "[http]\nlisten = \"127.0.0.1:0\"\n";

/// A server that is archived by an agent that listens; `None` where no server is installed.
fn listening(more: &str) -> Option<(Rig, Agent, SocketAddr)> {
    let server = Server::builder(postgres::newest_major()?).wal_segment_mib(1).start();
    let mut rig = Rig::new(server);
    // Without a base backup nothing is protected.
    rig.settings = format!("tail_interval = \"200ms\"\n{HTTP}{more}");
    let mut agent = rig.start();
    let address = http::address(&mut agent);
    Some((rig, agent, address))
}

fn keys(value: &Value) -> BTreeSet<&str> {
    value.as_object().expect("an object").keys().map(String::as_str).collect()
}

fn set(words: &str) -> BTreeSet<&str> {
    words.split_whitespace().collect()
}

#[test]
fn a_running_agent_is_seen_through() {
    let Some((rig, mut agent, address)) = listening("") else { return };
    for probe in ["/healthz", "/readyz"] {
        assert_eq!(get(address, probe).code, 200, "{probe}");
    }
    rig.write_much();
    rig.wait_archived();
    let protected = wait_protected(address, 200);
    assert_eq!(keys(&protected), set("schema protected clusters"));
    assert_eq!((&protected["clusters"][0]["name"], &protected["protected"]), (&"main".into(), &true.into()));

    let server_lsn = rig.server.flush_lsn();
    let status = eventually(PATIENCE, "the slot and the gaps are seen, and all is durable", || {
        let status = status_of(address, "main");
        let durable: Lsn = status["durable_lsn"].as_str()?.parse().ok()?;
        let is_seen = !status["slot"]["wal_status"].is_null() && !status["gaps"].is_null();
        (is_seen && durable >= server_lsn && status["health"] == "ok").then_some(status)
    });
    assert_eq!(
        keys(&status),
        set(
            "name system_id timeline state acknowledge server_lsn received_lsn proven_lsn durable_lsn acknowledged_lsn \
             rpo_seconds lag_bytes repositories slot last_backup backup_running retention next_backup last_verify window gaps health reasons"
        )
    );
    assert_eq!((&status["state"], &status["gaps"]), (&"streaming".into(), &0.into()));
    assert_eq!(status["system_id"], rig.server.system_id());
    assert_eq!(status["slot"]["wal_status"], "reserved");

    let answer = get(address, "/metrics");
    assert!(answer.head.contains("text/plain; version=0.0.4"), "{}", answer.head);
    let text = answer.body;
    for doc in CATALOGUE.iter().filter(|doc| !doc.name.contains("spool")) {
        if doc.kind == Kind::Gauge {
            assert!(text.contains(&format!("# HELP {} ", doc.name)), "{}", doc.name);
        }
    }
    let known: BTreeSet<&str> = CATALOGUE.iter().map(|doc| doc.name).collect();
    for line in text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        let name = line.split(['{', ' ']).next().unwrap();
        let base = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
        assert!(known.contains(name) || base.is_some_and(|base| known.contains(base)), "{line}");
    }
    let main = |name: &str| metric(&text, &format!("seawall_{name}{{cluster=\"main\"}}"));
    assert_eq!((main("protected"), main("paused"), main("slot_active")), (Some(1.0), Some(0.0), Some(1.0)));
    assert!(main("durable_lsn_bytes").unwrap() >= server_lsn.0 as f64);
    assert!(main("rpo_seconds").unwrap() < 3600.0 && main("streams_total").unwrap() >= 1.0);
    assert!(main("last_durable_commit_timestamp_seconds").unwrap() > 1.7e9, "{text}");
    let of_store = |name: &str| {
        let start = format!("seawall_{name}{{cluster=\"main\",repository=\"local\",kind=\"segment\"}}");
        metric(&text, &start).unwrap_or_else(|| panic!("no {start} in {text}"))
    };
    assert!(of_store("uploads_total") >= 1.0);
    assert_eq!(metric(&text, "seawall_state{cluster=\"main\",state=\"streaming\"}"), Some(1.0));
    assert!(metric(&text, "process_resident_memory_bytes").unwrap() > 1e6);

    // The command asks the agent where it is told that one listens, and says so.
    let config = rig.config("seawall");
    let ask = |json: &[&str]| {
        let mut command = agent::command(["--config", config.to_str().unwrap(), "status"].iter().chain(json));
        process::run(command.env("SEAWALL__HTTP__LISTEN", address.to_string()), PATIENCE)
    };
    // It does not wait for it long, and looks for itself then.
    let said = eventually(PATIENCE, "the agent tells", || {
        let said = ask(&["--json"]);
        assert!(said.status.success(), "{said:?}");
        let said: Value = serde_json::from_slice(&said.stdout).unwrap();
        (said["source"] == "agent").then_some(said)
    });
    assert_eq!(said["schema"], 1);
    let said = ask(&[]);
    assert!(String::from_utf8_lossy(&said.stdout).starts_with("main: ok, streaming, durable to "), "{said:?}");
    assert!(agent.terminate(PATIENCE).success());
    let said = ask(&["--json"]);
    let said: Value = serde_json::from_slice(&said.stdout).unwrap();
    assert_eq!(said["source"], "repository and server");
}

#[test]
fn a_dead_store_takes_the_protection_and_not_the_probes() {
    let Some((rig, _agent, address)) = listening("") else { return };
    rig.wait_archived();
    wait_protected(address, 200);
    let away = rig.scratch.join("away");
    fs::rename(rig.repository(), &away).unwrap();
    rig.write();
    eventually(PATIENCE, "it is not protected, and why", || {
        let reasons = wait_protected(address, 503)["clusters"][0]["reasons"].to_string();
        reasons.contains("repository local does not take WAL").then_some(())
    });
    assert_eq!((get(address, "/healthz").code, get(address, "/readyz").code), (200, 200));
    let text = get(address, "/metrics").body;
    let failing = "seawall_repository_state{cluster=\"main\",repository=\"local\",state=\"failing\"}";
    assert_eq!(metric(&text, failing), Some(1.0), "{text}");
    assert!(metric(&text, "seawall_store_retries_total{cluster=\"main\"}").unwrap() >= 1.0);
    assert!(text.contains("class=\"root_missing\""), "{text}");
    fs::rename(&away, rig.repository()).unwrap();
    wait_protected(address, 200);
}

#[test]
fn whoever_has_not_the_token_sees_the_probes_only() {
    let scratch = process::Scratch::new();
    let token = scratch.join("token");
    fs::write(&token, "canary\n").unwrap();
    let Some((_rig, agent, address)) = listening(&format!("token_file = \"{}\"\n", token.display())) else { return };
    for path in ["/", "/metrics", "/status", "/protected"] {
        let refused = get(address, path);
        assert!(refused.code == 401 && refused.head.contains("www-authenticate: bearer"), "{refused:?}");
        assert_eq!(get_with(address, path, "Authorization: Bearer wrong\r\n").code, 401);
        assert_ne!(get_with(address, path, "Authorization: Bearer canary\r\n").code, 401);
    }
    for path in ["/healthz", "/readyz"] {
        assert_eq!(get(address, path).code, 200);
    }
    assert!(!agent.stderr().contains("canary"));
}

#[test]
fn clients_cannot_hold_or_break_it() {
    let Some((_rig, _agent, address)) = listening("") else { return };
    assert!(get(address, "/").body.contains("/metrics"));
    assert_eq!(get(address, "/nothing").code, 404);
    let post = format!("POST /status HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(send(address, &post).unwrap().code, 405);
    let long = format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(1 << 20));
    assert!(send(address, &long).is_none_or(|answer| answer.code == 431));
    assert!(send(address, "nonsense\r\n\r\n").is_none_or(|answer| answer.code == 400));
    // More than may be connected at once, and none of them asks for anything: each is closed when its time for a
    // header is over, and the next one is let in.
    let silent: Vec<TcpStream> = (0..80).map(|_| TcpStream::connect(address).unwrap()).collect();
    assert_eq!(get(address, "/healthz").code, 200);
    drop(silent);
}

#[test]
fn an_address_in_use_is_said_before_anything_begins() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = |address: &str| {
        let mut command = agent::command(["--postgres", "host=127.0.0.1 port=1", "--repository", "file:///x", "run"]);
        let ended = process::run(command.env("SEAWALL__HTTP__LISTEN", address), PATIENCE);
        (ended.status.code().unwrap(), String::from_utf8_lossy(&ended.stderr).into_owned())
    };
    let (code, words) = listen(&taken.local_addr().unwrap().to_string());
    assert!(code == 69 && words.contains("could not listen on 127.0.0.1:") && words.contains("hint: "), "{words}");
    let (code, words) = listen("192.0.2.1:9187");
    assert!(code == 78 && words.contains("no address of this machine"), "{words}");
}
