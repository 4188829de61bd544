//! Many clusters in one agent: what happens to one is no concern of the others, and idle ones cost little.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;

use seawall::wal::Lsn;

use crate::support::agent::Agent;
use crate::support::http::{self, get, metric, status_of, wait_protected};
use crate::support::postgres::{self, Server};
use crate::support::process::{Scratch, eventually};
use crate::support::rig::PATIENCE;

/// What `[clusters.NAME]` and `[repositories.NAME]` say.
fn tables(name: &str, conninfo: &str, slot: &str, root: &std::path::Path) -> String {
    format!(
        "[clusters.{name}]\npostgres = \"{conninfo}\"\nslot = \"{slot}\"\nrepositories = [\"{name}\"]\n\
         tail_interval = \"200ms\"\n[repositories.{name}]\nurl = \"file://{}\"\n",
        root.display()
    )
}

fn write_config(scratch: &Scratch, text: &str) -> PathBuf {
    let path = scratch.join("seawall.toml");
    fs::write(&path, format!("{text}[http]\nlisten = \"127.0.0.1:0\"\n")).unwrap();
    path
}

fn run(config: &std::path::Path) -> Agent {
    Agent::start(["--config", config.to_str().unwrap(), "run"])
}

/// Writes, and waits until that is durable, as the agent says.
fn assert_goes_on(server: &Server, address: SocketAddr, cluster: &str) {
    server.sql("insert into written select generate_series(1, 1000)");
    let flushed = server.flush_lsn();
    eventually(PATIENCE, &format!("{cluster} stores {flushed}"), || {
        let status = status_of(address, cluster);
        let acknowledged: Lsn = status["acknowledged_lsn"].as_str()?.parse().ok()?;
        (acknowledged >= flushed).then_some(())
    });
}

fn server(major: u32) -> Server {
    let server = Server::builder(major).wal_segment_mib(1).start();
    server.sql("create table written (n int)");
    server
}

/// One dies, one was never there, one is another server than it was, one has a store that is gone: the rest goes on.
#[test]
fn one_failing_never_touches_another() {
    let Some(major) = postgres::newest_major() else { return };
    let (healthy, mut dying, storeless, other) = (server(major), server(major), server(major), server(major));
    let scratch = Scratch::new();
    let root = |name: &str| scratch.join(&format!("repository_{name}"));
    // The archive of "impostor" was begun by the server that is "storeless" later.
    let first = tables("impostor", &storeless.conninfo(), "first", &root("impostor"));
    let first = write_config(&scratch, &first);
    let mut agent = run(&first);
    let address = http::address(&mut agent);
    wait_protected(address, 200);
    assert!(agent.terminate(PATIENCE).success());

    let text = [
        tables("healthy", &healthy.conninfo(), "seawall", &root("healthy")),
        tables("dying", &dying.conninfo(), "seawall", &root("dying")),
        tables("storeless", &storeless.conninfo(), "seawall", &root("storeless")),
        tables("impostor", &other.conninfo(), "seawall", &root("impostor")),
        tables("absent", "host=127.0.0.1 port=1 user=nobody", "seawall", &root("absent")),
        tables("unknown", "host=no-such-host.invalid user=nobody", "seawall", &root("unknown")),
    ];
    let mut agent = run(&write_config(&scratch, &text.concat()));
    let address = http::address(&mut agent);
    for (name, server) in [("healthy", &healthy), ("dying", &dying), ("storeless", &storeless)] {
        assert_goes_on(server, address, name);
    }
    for (name, words) in
        [("impostor", "system identifier"), ("absent", "could not connect"), ("unknown", "no-such-host.invalid")]
    {
        let status = eventually(PATIENCE, &format!("{name} says why"), || {
            let status = status_of(address, name);
            status["reasons"].to_string().contains(words).then_some(status)
        });
        assert_eq!((&status["state"], &status["health"]), (&"connecting".into(), &"failing".into()));
    }
    assert_goes_on(&healthy, address, "healthy");

    dying.kill9();
    fs::rename(root("storeless"), root("away")).unwrap();
    storeless.sql("insert into written select generate_series(1, 1000)");
    for name in ["dying", "storeless"] {
        eventually(PATIENCE, &format!("{name} is failing"), || {
            (status_of(address, name)["health"] == "failing").then_some(())
        });
    }
    for _ in 0..3 {
        assert_goes_on(&healthy, address, "healthy");
    }
    // Once the healthy one has its base backup.
    eventually(PATIENCE, "the healthy one is protected, and no other", || {
        let protected = get(address, "/protected");
        assert_eq!(protected.code, 503);
        let clusters = protected.json()["clusters"].as_array().unwrap().clone();
        clusters.iter().all(|cluster| cluster["protected"] == (cluster["name"] == "healthy")).then_some(())
    });

    // What was mended comes back by itself.
    fs::rename(root("away"), root("storeless")).unwrap();
    dying.start();
    for (name, server) in [("healthy", &healthy), ("dying", &dying), ("storeless", &storeless)] {
        assert_goes_on(server, address, name);
    }
    assert!(agent.terminate(PATIENCE).success());
}

const IDLE_CLUSTERS: usize = 100;
const IDLE_BYTES_MAX: u64 = 256 << 20;

#[test]
fn a_hundred_idle_clusters_fit_into_256_mib() {
    let Some(major) = postgres::newest_major() else { return };
    let server = Server::builder(major)
        .wal_segment_mib(1)
        .setting("max_connections", "150")
        .setting("max_wal_senders", "110")
        .setting("max_replication_slots", "110")
        .start();
    let scratch = Scratch::new();
    let repository = format!("[repositories.local]\nurl = \"file://{}\"\n", scratch.join("repository").display());
    let clusters = (0..IDLE_CLUSTERS).map(|n| {
        format!(
            "[clusters.c{n}]\npostgres = \"{}\"\nslot = \"s{n}\"\nbackup.automatic = false\n\
             tail_interval = \"200ms\"\n",
            server.conninfo()
        )
    });
    let text = repository + &clusters.collect::<String>();
    let mut agent = run(&write_config(&scratch, &text));
    let address = http::address(&mut agent);
    // Once they have all been asked for their slots, and somebody looks at everything.
    let metrics = eventually(PATIENCE, "every slot is seen", || {
        let metrics = get(address, "/metrics").body;
        let seen = (0..IDLE_CLUSTERS)
            .filter(|n| metric(&metrics, &format!("seawall_slot_active{{cluster=\"c{n}\"}}")) == Some(1.0));
        (seen.count() == IDLE_CLUSTERS).then_some(metrics)
    });
    let peak = peak_resident_bytes(agent.pid());
    println!("{IDLE_CLUSTERS} idle clusters: {} MiB at most, /metrics {} KiB", peak >> 20, metrics.len() >> 10);
    assert!(peak < IDLE_BYTES_MAX, "{} MiB", peak >> 20);
    assert!(agent.terminate(PATIENCE).success());
}

fn peak_resident_bytes(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the agent runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("Linux says it");
    process_kib(line) << 10
}

fn process_kib(line: &str) -> u64 {
    line.trim().trim_end_matches("kB").trim().parse().expect("a number of KiB")
}
