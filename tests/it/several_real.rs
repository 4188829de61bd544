//! Several repositories of one cluster, with real agents, servers and stores: one is away for a while, for long, or for
//! ever; what is acknowledged meanwhile, what each holds afterwards, what all of them hold together.
//! Its seeded and virtual-time counterparts are `simulation.rs` and `several.rs`.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

use seawall::agent::startup::frontier_of;
use seawall::catalog::store::{self, Archive};
use seawall::repository::LocalBackend;
use seawall::wal::{Lsn, TimelineId};
use serde_json::Value;

use crate::support::agent::{self, Agent};
use crate::support::archived::{create_journal, note, notes};
use crate::support::http;
use crate::support::postgres::{self, Builder, Server};
use crate::support::process::{self, Scratch, eventually};
use crate::support::rig::{self, wait_for};
use crate::support::s3::{self, S3Server};

/// For whatever an agent does by itself.
const PATIENCE: Duration = process::DEADLINE;
/// Small, so that a repository that is away is left behind soon.
const MEMORY_BYTES: u64 = 8 << 20;

fn server(major: u32) -> Builder {
    Server::builder(major).wal_segment_mib(1).setting("wal_sender_timeout", "30s")
}

/// It keeps the WAL that archives are compared with.
fn keeping_server(major: u32) -> Builder {
    server(major).setting("wal_keep_size", "4GB").setting("max_wal_size", "2GB")
}

/// A server, repositories in directories `a` and `b`, perhaps another one in S3 (`s3`), and how many are required.
struct Place {
    server: Server,
    scratch: Scratch,
    required: &'static str,
    names: &'static [&'static str],
    s3: Option<S3Server>,
}

impl Place {
    fn new(required: &'static str, names: &'static [&'static str]) -> Option<Place> {
        let server = keeping_server(postgres::newest_major()?).start();
        Some(Place::of(server, required, names))
    }

    fn of(server: Server, required: &'static str, names: &'static [&'static str]) -> Place {
        let s3 = names.contains(&"s3").then(S3Server::start);
        Place { server, scratch: Scratch::new(), required, names, s3 }
    }

    fn root(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    /// Where a directory lies while it is away.
    fn aside(&self, name: &str) -> PathBuf {
        self.scratch.join(&format!("{name}.away"))
    }

    fn take_away(&self, name: &str) {
        fs::rename(self.root(name), self.aside(name)).expect("our directory can be renamed");
    }

    fn bring_back(&self, name: &str) {
        fs::rename(self.aside(name), self.root(name)).expect("our directory can be renamed");
    }

    /// A configuration with these repositories.
    fn config(&self, names: &[&str]) -> PathBuf {
        let path = self.scratch.join(&format!("{}.toml", names.join("-")));
        let required = if names.len() == self.names.len() { self.required } else { "1" };
        let mut text = format!(
            "[clusters.main]\npostgres = \"{}\"\nslot = \"seawall\"\nrepositories = {names:?}\nrequired = {required}\n\
             backup.automatic = false\ntail_interval = \"200ms\"\nmemory = \"{}MiB\"\n[http]\nlisten = \"127.0.0.1:0\"\n",
            self.server.conninfo(),
            MEMORY_BYTES >> 20,
        );
        for name in names {
            text.push_str(&match &self.s3 {
                Some(store) if *name == "s3" => format!(
                    "[repositories.s3]\nurl = \"s3://{}/main\"\nendpoint = \"{}\"\nregion = \"{}\"\n",
                    s3::BUCKET,
                    store.endpoint(),
                    s3::REGION
                ),
                _ => format!("[repositories.{name}]\nurl = \"file://{}\"\n", self.root(name).display()),
            });
        }
        fs::write(&path, text).expect("a test's file can be written");
        path
    }

    fn command(&self, names: &[&str], arguments: &[&str]) -> Command {
        let config = self.config(names);
        let mut command = agent::command(["--config", config.to_str().expect("UTF-8")].iter().chain(arguments));
        command.envs(s3::environment(s3::ACCESS_KEY, s3::SECRET_KEY));
        command
    }

    fn run(&self, names: &[&str], arguments: &[&str]) -> Output {
        process::run(&mut self.command(names, arguments), PATIENCE)
    }

    fn agent(&self) -> Watched {
        let mut agent = Agent::spawn(self.command(self.names, &["run"]));
        let address = http::address(&mut agent);
        Watched { agent, address }
    }

    /// An agent all of whose repositories hold what there is.
    fn working(&self) -> Watched {
        let mut agent = self.agent();
        agent.wait_states(&vec!["ok"; self.names.len()]);
        self.server.sql("create table noise (text text)");
        self.wait_acknowledged(&mut agent);
        agent
    }

    // --- The server ---

    fn acknowledged(&self) -> Lsn {
        let lsn = self.server.value("select restart_lsn from pg_replication_slots where slot_name = 'seawall'");
        lsn.parse().expect("the slot holds WAL")
    }

    fn wait_acknowledged(&self, agent: &mut Watched) -> Lsn {
        let flushed = self.server.flush_lsn();
        eventually(PATIENCE, &format!("{flushed} is acknowledged"), || {
            assert!(agent.agent.is_running(), "the agent has ended");
            Some(self.acknowledged()).filter(|acknowledged| *acknowledged >= flushed)
        })
    }

    /// About so many MiB of WAL of which half is left when it is compressed.
    fn write_noise(&self, mib: u32) {
        let noise = "select string_agg(md5(random()::text || i), '') from generate_series(1, 32768) i";
        self.server.sql(&format!(
            "do $$ declare noise text := ({noise}); begin for i in 1..{mib} loop \
             perform pg_logical_emit_message(false, 'noise', noise); end loop; end $$"
        ));
    }

    // --- What a repository holds ---

    /// Every segment the server still has, asked of these repositories only; how many there are. No gap either.
    fn assert_complete(&self, names: &[&str]) -> usize {
        self.assert_complete_to(self.acknowledged(), names)
    }

    /// Of each repository by itself: the same, and as many. An idle server writes now and then, and begins a segment.
    fn assert_each_complete(&self, names: &[&str]) -> usize {
        let acknowledged = self.acknowledged();
        let compared: Vec<usize> = names.iter().map(|name| self.assert_complete_to(acknowledged, &[name])).collect();
        assert!(compared.iter().all(|count| *count == compared[0]), "{names:?}: {compared:?}");
        compared[0]
    }

    fn assert_complete_to(&self, acknowledged: Lsn, names: &[&str]) -> usize {
        let gaps = self.run(names, &["gaps"]);
        assert!(gaps.status.success(), "{names:?}: {}", String::from_utf8_lossy(&gaps.stdout));
        let mut files: Vec<String> = fs::read_dir(self.server.wal_dir())
            .expect("root may list it")
            .filter_map(|entry| entry.expect("listed").file_name().into_string().ok())
            .filter(|name| name.len() == 24 && name.starts_with("00000001"))
            .collect();
        files.sort();
        let mut compared = 0;
        for name in files {
            let start = segment_start(&name);
            if start >= acknowledged {
                break; // not written yet: a file kept for later
            }
            let to = self.scratch.join("delivered");
            let ran = self.run(names, &["wal-get", &name, to.to_str().expect("text")]);
            let delivered = ran.status.success();
            assert!(delivered || compared == 0, "{names:?}: {name}: {}", String::from_utf8_lossy(&ran.stderr));
            if delivered {
                let (ours, theirs) = (fs::read(&to).expect("delivered"), fs::read(self.server.wal_dir().join(&name)));
                let known = (acknowledged - start).min(1 << 20) as usize;
                assert!(ours[..known] == theirs.expect("wal_keep_size keeps it")[..known], "{names:?}: {name}");
                let _ = fs::remove_file(&to);
                compared += 1;
            }
        }
        compared
    }

    /// Sealed segments, by name, as they are stored.
    fn sealed(&self, name: &str) -> BTreeMap<String, Vec<u8>> {
        let key_of = |key: &str| key.rsplit('/').next().expect("split yields a part").to_string();
        let mut objects: BTreeMap<String, Vec<u8>> = match &self.s3 {
            Some(store) if name == "s3" => {
                store.objects().into_iter().map(|(key, stored)| (key_of(&key), stored.body.to_vec())).collect()
            }
            _ => {
                let paths = files_below(&self.root(name));
                let read = |path: PathBuf| Some((key_of(path.to_str()?), fs::read(&path).ok()?));
                paths.into_iter().filter_map(read).collect()
            }
        };
        objects.retain(|name, _| name.len() == 28 && name.ends_with(".zst"));
        objects
    }

    /// The last record end a new agent would go on from, were this directory alone.
    fn durable(&self, root: &Path) -> Lsn {
        let backend = Arc::new(LocalBackend::open(root.to_path_buf()));
        let (lineage, file) =
            wait_for(store::lineages(backend.as_ref(), "main")).expect("it can be listed").pop().expect("it was used");
        let state = wait_for(Archive::new(backend, lineage).frontier(TimelineId(1), file.segment_size));
        frontier_of(&state.expect("it can be read"), file.segment_size)
            .map_or(Lsn::ZERO, |frontier| frontier.stored().record_end)
    }

    /// Of all of them together; none may be open.
    fn gaps(&self) -> Value {
        let ran = self.run(self.names, &["gaps", "--json"]);
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stdout));
        let text = String::from_utf8_lossy(&ran.stdout).into_owned();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {ran:?}"))
    }
}

/// Segments of 1 MiB.
fn segment_start(name: &str) -> Lsn {
    let part = |range: std::ops::Range<usize>| u64::from_str_radix(&name[range], 16).expect("hexadecimal");
    Lsn((part(8..16) << 32) + (part(16..24) << 20))
}

fn files_below(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    // What is removed meanwhile is nothing to find.
    for path in fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path()) {
        match path.is_dir() {
            true => found.extend(files_below(&path)),
            false => found.push(path),
        }
    }
    found
}

/// An agent and where it can be looked at.
struct Watched {
    agent: Agent,
    address: SocketAddr,
}

impl Watched {
    /// The words for its repositories, in the order of the configuration.
    fn states(&self) -> Vec<String> {
        let status = http::status_of(self.address, "main");
        let repositories = status["repositories"].as_array().cloned().unwrap_or_default();
        repositories.iter().map(|shown| shown["state"].as_str().unwrap_or_default().to_string()).collect()
    }

    fn wait_states(&mut self, expected: &[&str]) {
        let started = std::time::Instant::now();
        loop {
            let states = self.states();
            if states == expected {
                return;
            }
            assert!(self.agent.is_running(), "the agent has ended");
            assert!(started.elapsed() < PATIENCE, "{expected:?} are expected, the repositories are {states:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// One has left the stream or was not let in.
    fn wait_out(&mut self, index: usize) {
        eventually(PATIENCE, "the repository is left out", || {
            let states = self.states();
            states.get(index).is_some_and(|state| matches!(state.as_str(), "unavailable" | "behind")).then_some(())
        });
    }
}

/// VmHWM: the most that was ever resident.
fn peak_bytes(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process is there");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("Linux says so");
    line.trim().trim_end_matches("kB").trim().parse::<u64>().expect("a number of KiB") << 10
}

#[test]
fn one_that_was_away_under_load_gets_what_it_missed_byte_for_byte() {
    let Some(place) = Place::new("1", &["a", "b"]) else { return };
    let mut agent = place.working();
    place.server.pgbench_init(2);
    let load = place.server.pgbench_background(2, 600);
    place.wait_acknowledged(&mut agent);
    let streams = |agent: &Watched| agent.agent.stderr().matches("the server streams").count();
    let before = streams(&agent);
    place.take_away("b");
    // More than memory holds: it is left behind. What is written meanwhile is acknowledged all the same.
    for _ in 0..4 {
        place.write_noise(8);
        place.wait_acknowledged(&mut agent);
    }
    agent.wait_out(1);
    let missed: Vec<String> = place.sealed("a").into_keys().collect();
    place.bring_back("b");
    agent.wait_states(&["ok", "ok"]);
    drop(load);
    place.server.wait_no_load();
    place.server.switch_wal();
    place.wait_acknowledged(&mut agent);
    println!("{} streams began meanwhile", streams(&agent) - before);
    assert!(agent.agent.stderr().contains("the repository is whole again"), "it was repaired, not received again");
    eventually(PATIENCE, "both hold the same segments", || (place.sealed("a") == place.sealed("b")).then_some(()));
    let held = place.sealed("b");
    assert!(missed.iter().all(|name| held.contains_key(name)));
    let compared = place.assert_each_complete(&["a", "b"]);
    assert!(compared >= 16, "{compared}");
}

#[test]
fn one_that_is_down_for_long_costs_neither_memory_nor_progress() {
    let Some(place) = Place::new("1", &["a", "s3"]) else { return };
    let mut agent = place.working();
    let store = place.s3.as_ref().expect("it is one of them");
    store.down();
    // Thirty times what memory may hold.
    for _ in 0..6 {
        place.write_noise(40);
        place.wait_acknowledged(&mut agent);
    }
    agent.wait_out(1);
    let peak = peak_bytes(agent.agent.pid());
    println!("peak {} MiB, now {} MiB", peak >> 20, rig::resident_bytes(agent.agent.pid()) >> 20);
    assert!(peak < 160 << 20, "{} MiB resident at the peak", peak >> 20);
    assert!(place.durable(&place.root("a")) >= place.acknowledged(), "one of them is enough, and has it");
    let held = place.sealed("s3").len();
    assert!(place.sealed("a").len() > held + 200);
    store.up();
    agent.wait_states(&["ok", "ok"]);
    place.server.switch_wal();
    place.wait_acknowledged(&mut agent);
    eventually(PATIENCE, "both hold the same segments", || (place.sealed("a") == place.sealed("s3")).then_some(()));
    let peak = peak_bytes(agent.agent.pid());
    println!("peak {} MiB once it was repaired", peak >> 20);
    assert!(peak < 160 << 20, "{} MiB resident at the peak", peak >> 20);
    assert!(place.assert_complete(&["s3"]) > 200);
}

#[test]
fn one_that_was_lost_and_is_made_anew_gets_everything_again() {
    let Some(place) = Place::new("1", &["a", "b"]) else { return };
    let mut agent = place.working();
    place.write_noise(8);
    place.wait_acknowledged(&mut agent);
    fs::remove_dir_all(place.root("b")).expect("root may remove it");
    for _ in 0..4 {
        place.write_noise(8);
        place.wait_acknowledged(&mut agent);
    }
    agent.wait_out(1);
    assert!(!place.root("b").exists(), "nothing is made in the place of what may come back");
    let made = place.run(&["a", "b"], &["init", "--create"]);
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    agent.wait_states(&["ok", "ok"]);
    place.server.switch_wal();
    place.wait_acknowledged(&mut agent);
    eventually(PATIENCE, "both hold the same segments", || (place.sealed("a") == place.sealed("b")).then_some(()));
    let compared = place.assert_each_complete(&["a", "b"]);
    assert!(compared >= 40, "{compared}");
    assert_eq!(place.gaps()["lacks"], serde_json::json!([]));
}

#[test]
fn where_all_are_required_nothing_is_acknowledged_that_one_lacks() {
    let Some(place) = Place::new("\"all\"", &["a", "b"]) else { return };
    let mut agent = place.working();
    place.take_away("b");
    place.write_noise(40);
    let written = place.server.flush_lsn();
    // It goes on for the other as far as memory allows, and is not told.
    eventually(PATIENCE, "the other stores some of it", || (place.sealed("a").len() > 8).then_some(()));
    agent.wait_out(1);
    eventually(PATIENCE, "the other stores all of it", || (place.durable(&place.root("a")) >= written).then_some(()));
    let held = place.durable(&place.aside("b"));
    let acknowledged = place.acknowledged();
    assert!(
        acknowledged <= held && held < written,
        "{acknowledged} is acknowledged, the one that is away ends at {held}"
    );
    place.bring_back("b");
    place.wait_acknowledged(&mut agent);
    agent.wait_states(&["ok", "ok"]);
    for name in ["a", "b"] {
        assert!(place.assert_complete(&[name]) >= 40);
    }
}

#[test]
fn holes_that_another_holds_are_no_gap_and_a_server_recovers_from_both_together() {
    let Some(major) = postgres::newest_major() else { return };
    let place = Place::of(server(major).start(), "1", &["a", "b"]);
    let mut agent = place.working();
    let backup = place.server.base_backup_without_wal();
    create_journal(&place.server);
    note(&place.server, "in both");
    place.wait_acknowledged(&mut agent);
    place.take_away("a");
    place.server.switch_wal();
    note(&place.server, "while a is away");
    let missed = place.server.current_segment();
    place.write_noise(8);
    note(&place.server, "while a is away, again");
    place.server.switch_wal();
    place.wait_acknowledged(&mut agent);
    agent.agent.kill9();
    place.bring_back("a");
    // What the first one misses cannot be copied now, nor received again.
    place.take_away("b");
    eventually(PATIENCE, "the server forgets it", || {
        place.server.sql("checkpoint");
        (!place.server.wal_dir().join(&missed).exists()).then_some(())
    });
    let mut agent = place.agent();
    note(&place.server, "while b is away");
    place.write_noise(8);
    note(&place.server, "while b is away, again");
    let last = format!("{}.zst", place.server.current_segment());
    place.server.switch_wal();
    eventually(PATIENCE, "the one that is back stores what is new", || {
        assert!(agent.agent.is_running(), "the agent has ended");
        place.sealed("a").contains_key(&last).then_some(())
    });
    // For all it can know, that is a gap; it goes on behind it.
    agent.agent.wait_for_log("the archive has a gap", PATIENCE);
    agent.agent.kill9();
    let expected = notes(&place.server);
    place.bring_back("b");

    let gaps = place.gaps();
    assert!(gaps["lacks"].as_array().expect("a list").iter().any(|lack| lack["repository"] == "a"), "{gaps}");
    let has = |name: &str, segment: &str| {
        let to = place.scratch.join("delivered");
        place.run(&[name], &["wal-get", segment, to.to_str().expect("text")]).status.success()
    };
    assert_eq!((has("a", &missed), has("b", &missed)), (false, true));
    assert_eq!((has("a", &last[..24]), has("b", &last[..24])), (true, false));
    let config = place.config(place.names);
    let words = ["wal-get", "%f", "%p", "--config", config.to_str().expect("UTF-8")];
    process::give_to_service_user(&place.root("b"));
    let command = agent::restore_command(&place.scratch, &place.root("a"), &words);
    let restored = backup.recover(&command).start_recovered().expect("together they have all of it");
    assert_eq!(notes(&restored), expected);
    drop(restored);

    // Together again, each gets what it misses.
    let mut agent = place.agent();
    agent.wait_states(&["ok", "ok"]);
    place.wait_acknowledged(&mut agent);
    eventually(PATIENCE, "both hold the same segments", || (place.sealed("a") == place.sealed("b")).then_some(()));
    assert_eq!(place.gaps()["lacks"], serde_json::json!([]));
}
