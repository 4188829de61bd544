//! Base backups as the agent and the command line take them, on real servers: by itself, one at a time, through crashes,
//! beside a stream that goes on.

use std::fs;
use std::path::PathBuf;
use std::process::Output;

use rustix::process::{Pid, kill_process};
use seawall::catalog::ledger::FactKind;
use seawall::wal::Lsn;
use serde_json::Value;

use crate::support::agent::{self, Agent, Signal};
use crate::support::http::{self, get, metric, status_of, wait_protected};
use crate::support::postgres::{self, Server};
use crate::support::process::{self, eventually};
use crate::support::rig::{NO_BACKUPS, PATIENCE, Rig};

const TAILS: &str = "tail_interval = \"200ms\"\n";
/// A new cluster is some 20 MiB: this makes its copying last long enough to be seen, and held.
const SLOWLY: &str = "backup.max_rate = \"2MiB\"\n";
/// For one that nobody lets come to its end.
const VERY_SLOWLY: &str = "backup.max_rate = \"64KiB\"\n";

/// The server's process that sends a base backup, stopped until this is dropped: it goes on for as long as a test needs.
struct Held(Pid);

impl Held {
    fn now(rig: &Rig) -> Held {
        const SENDER: &str = "select pid from pg_stat_progress_basebackup where phase = 'streaming database files'";
        let pid = eventually(PATIENCE, "files are sent", || rig.server.sql(SENDER).pop()?.pop()?.parse().ok());
        let held = Held(Pid::from_raw(pid).expect("a process id"));
        kill_process(held.0, Signal::STOP).expect("root may stop it, and so may its user");
        held
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = kill_process(self.0, Signal::CONT);
    }
}

fn rig(settings: &str) -> Option<Rig> {
    let server = Server::builder(postgres::newest_major()?).wal_segment_mib(1).setting("wal_sender_timeout", "10min");
    let server = server.start();
    let mut rig = Rig::new(server);
    rig.settings = format!("{TAILS}{settings}");
    Some(rig)
}

/// As the agent was started with it: writing it anew would meet an agent that is about to read it.
fn config_of(rig: &Rig) -> PathBuf {
    let path = rig.scratch.join("seawall.toml");
    if path.exists() { path } else { rig.config("seawall") }
}

fn run(rig: &Rig, arguments: &[&str]) -> Output {
    let config = config_of(rig);
    let arguments = ["--config", config.to_str().expect("UTF-8")].into_iter().chain(arguments.iter().copied());
    process::run(&mut agent::command(arguments), PATIENCE)
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

/// What `list --all` says.
fn backups(rig: &Rig) -> Vec<Value> {
    if rig.try_archive().is_none() {
        return Vec::new();
    }
    json(&run(rig, &["list", "--all", "--json"]))["backups"].as_array().expect("a list").clone()
}

fn of_status(backups: &[Value], status: &str) -> Vec<Value> {
    backups.iter().filter(|backup| backup["status"] == status).cloned().collect()
}

fn wait_complete(rig: &Rig, count: usize) -> Vec<Value> {
    eventually(PATIENCE, &format!("{count} complete backup(s)"), || {
        let complete = of_status(&backups(rig), "complete");
        (complete.len() >= count).then_some(complete)
    })
}

fn lsn(value: &Value) -> Lsn {
    value.as_str().expect("an LSN").parse().expect("an LSN")
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[test]
fn the_first_one_is_taken_without_being_asked_while_the_stream_goes_on() {
    let Some(mut rig) = rig(&format!("backup.label = \"by itself\"\n{SLOWLY}")) else { return };
    rig.settings.push_str("[http]\nlisten = \"127.0.0.1:0\"\n");
    rig.server.sql("create table written (n int)");
    let mut agent = rig.start();
    let address = http::address(&mut agent);
    let unprotected = wait_protected(address, 503);
    assert!(unprotected.to_string().contains("not streaming") || unprotected.to_string().contains("base backup"));
    // Under way, what is written becomes durable as ever.
    let held = Held::now(&rig);
    let running = eventually(PATIENCE, "the copying is under way", || {
        let status = status_of(address, "main");
        (status["backup_running"]["phase"] == "copying").then(|| status["backup_running"].clone())
    });
    for _ in 0..3 {
        rig.server.sql("insert into written select generate_series(1, 1000)");
        rig.wait_archived();
    }
    let list = backups(&rig);
    assert_eq!((list.len(), &list[0]["status"], &list[0]["id"]), (1, &"running".into(), &running["id"]));
    drop(held);

    let complete = wait_complete(&rig, 1);
    let backup = &complete[0];
    let expected = "id type parent started finished start_lsn stop_lsn timeline raw_bytes stored_bytes status pinned label \
                    postgres_version";
    for key in expected.split_whitespace() {
        assert!(backup.as_object().expect("an object").contains_key(key), "{key}: {backup}");
    }
    assert_eq!(
        (&backup["type"], &backup["label"], &backup["id"]),
        (&"full".into(), &"by itself".into(), &running["id"])
    );
    assert!(lsn(&backup["start_lsn"]) < lsn(&backup["stop_lsn"]), "{backup}");
    assert!(rig.durable() >= lsn(&backup["stop_lsn"]));
    assert!(backup["raw_bytes"].as_u64() > Some(20 << 20) && backup["stored_bytes"].as_u64() < Some(20 << 20));

    wait_protected(address, 200);
    let status = status_of(address, "main");
    assert_eq!((&status["last_backup"]["id"], &status["backup_running"]), (&backup["id"], &Value::Null));
    let metrics = get(address, "/metrics").body;
    let main = |name: &str| metric(&metrics, &format!("seawall_{name}{{cluster=\"main\"}}"));
    assert_eq!((main("backups_total"), main("backup_running")), (Some(1.0), Some(0.0)));
    assert_eq!(main("last_backup_raw_bytes"), backup["raw_bytes"].as_f64());
    assert!(agent.terminate(PATIENCE).success());

    // It is there: none is taken again, and the repository alone tells about it.
    let _agent = rig.start();
    rig.write();
    rig.wait_archived();
    let said = text(&run(&rig, &["status"]));
    assert!(said.contains(&format!("last backup {}", backup["id"].as_str().expect("an id"))), "{said}");
    assert_eq!(backups(&rig).len(), 1);
}

#[test]
fn one_at_a_time_by_hand() {
    let Some(rig) = rig(&format!("{NO_BACKUPS}{SLOWLY}")) else { return };
    let nobody = run(&rig, &["backup"]);
    assert!(!nobody.status.success(), "nobody archives: {nobody:?}");
    let mut agent = rig.start();
    agent.wait_for_log("streaming", PATIENCE);
    rig.write();
    rig.wait_archived();
    let config = config_of(&rig);
    let config = config.to_str().expect("UTF-8");
    let mut first = Agent::start(["--config", config, "backup", "--label", "first", "--json"]);
    first.wait_for_log("copying", PATIENCE);
    let held = Held::now(&rig);
    let refused = run(&rig, &["backup"]);
    assert_eq!(refused.status.code(), Some(75), "{refused:?}");
    assert!(text(&refused).contains("`seawall backup`") && text(&refused).contains("--wait"), "{refused:?}");
    let mut second = Agent::start(["--config", config, "backup", "--wait", "--label", "second"]);
    second.wait_for_log("waiting for the lease", PATIENCE);
    drop(held);
    assert!(first.wait(PATIENCE).success(), "{}", first.stderr());
    let entry: Value = serde_json::from_str(&first.stdout()).expect("JSON");
    assert_eq!((&entry["label"], &entry["status"], &entry["schema"]), (&"first".into(), &"complete".into(), &1.into()));
    assert!(second.wait(PATIENCE).success(), "{}", second.stderr());
    let labels: Vec<_> = wait_complete(&rig, 2).iter().map(|backup| backup["label"].clone()).collect();
    assert_eq!(labels, ["first", "second"]);

    // Pinned and not.
    let id = entry["id"].as_str().expect("an id");
    let pinned = || backups(&rig).iter().filter(|backup| backup["pinned"] == true).count();
    for (verb, count) in [("pin", 1), ("pin", 1), ("unpin", 0), ("unpin", 0), ("pin", 1)] {
        assert!(run(&rig, &[verb, id]).status.success(), "{verb}");
        assert_eq!(pinned(), count, "{verb}");
    }
    assert_eq!(run(&rig, &["pin", "20200101T000000Z-full"]).status.code(), Some(64));
    assert_eq!(run(&rig, &["pin", "latest"]).status.code(), Some(64));
    let table = text(&run(&rig, &["list"]));
    assert!(table.contains("ID") && table.contains("complete, pinned") && table.contains("second"), "{table}");

    // Stopped, with the agent gone: it is said that nobody archives.
    assert!(agent.terminate(PATIENCE).success());
    let refused = run(&rig, &["backup"]);
    assert_eq!(refused.status.code(), Some(69), "{refused:?}");
    assert!(text(&refused).contains("nobody streams from slot seawall"), "{refused:?}");
}

/// Killed while `phase` lasts, and started again.
fn killed_in(phase: &str, settings: &str, prepare: impl Fn(&Rig)) {
    let Some(mut rig) = rig(settings) else { return };
    prepare(&rig);
    let mut agent = rig.start();
    agent.wait_for_log(phase, PATIENCE);
    agent.kill9();
    let left = backups(&rig);
    assert_eq!((left.len(), of_status(&left, "complete").len()), (1, 0), "{left:?}");
    rig.settings = TAILS.to_string();
    let mut agent = rig.start();
    let complete = wait_complete(&rig, 1);
    let all = backups(&rig);
    let failed = of_status(&all, "failed");
    assert_eq!((failed.len(), &failed[0]["id"]), (1, &left[0]["id"]), "{all:?}");
    assert_ne!(complete[0]["id"], left[0]["id"]);
    assert!(failed[0]["cause"].as_str().expect("a cause").contains("interrupted"), "{failed:?}");
    assert_eq!(rig.facts(FactKind::BackupFailed).len(), 1);
    assert!(!text(&run(&rig, &["list"])).contains("failed"));
    assert!(agent.terminate(PATIENCE).success());
}

#[test]
fn killed_while_the_server_makes_its_checkpoint() {
    let dirty = |rig: &Rig| {
        rig.server.sql("create table much as select md5(i::text) from generate_series(1, 300000) i");
    };
    killed_in("checkpoint", "backup.checkpoint = \"spread\"\n", dirty);
}

#[test]
fn killed_while_files_are_copied() {
    killed_in("copying", VERY_SLOWLY, |_| {});
}

/// The one who takes it and the one who streams are two here: the stream stands still, and the backup waits.
#[test]
fn killed_while_it_waits_for_wal() {
    let Some(rig) = rig(NO_BACKUPS) else { return };
    let mut agent = rig.start();
    agent.wait_for_log("streaming", PATIENCE);
    rig.write();
    rig.wait_archived();
    agent.signal(Signal::STOP);
    let config = config_of(&rig);
    let config = config.to_str().expect("UTF-8");
    let mut taking = Agent::start(["--config", config, "backup"]);
    taking.wait_for_log("waiting for WAL", PATIENCE);
    taking.kill9();
    agent.signal(Signal::CONT);
    let done = run(&rig, &["backup", "--json"]);
    assert!(done.status.success(), "{done:?}");
    let all = backups(&rig);
    assert_eq!((of_status(&all, "failed").len(), of_status(&all, "complete").len()), (1, 1), "{all:?}");
}

/// Asked to stop, it gives the backup up and says so.
#[test]
fn stopped_while_files_are_copied() {
    let Some(rig) = rig(VERY_SLOWLY) else { return };
    let mut agent = rig.start();
    agent.wait_for_log("copying", PATIENCE);
    assert!(agent.terminate(PATIENCE).success());
    let all = backups(&rig);
    assert_eq!((all.len(), &all[0]["status"]), (1, &"failed".into()));
    assert!(all[0]["cause"].as_str().expect("a cause").contains("stopped"), "{all:?}");
    let facts = rig.facts(FactKind::BackupFailed);
    assert_eq!((facts.len(), &facts[0].details["phase"]), (1, &"copying".into()), "{facts:?}");
}

#[test]
fn from_a_standby_while_the_primary_is_idle() {
    let Some(mut rig) = rig("") else { return };
    rig.write();
    let standby = Server::standby_of(&rig.server).start();
    rig.settings.push_str(&format!("backup.from = \"{}\"\n", standby.conninfo()));
    let mut agent = rig.start();
    let backup = wait_complete(&rig, 1).remove(0);
    assert!(rig.durable() >= lsn(&backup["stop_lsn"]), "{backup}");
    let (archive, _) = rig.archive();
    let id = backup["id"].as_str().expect("an id").parse().expect("an id");
    let record = crate::support::rig::wait_for(archive.backup_record(id)).expect("it can be read");
    assert!(record.backup.expect("it is complete").from_standby);
    assert!(standby.log().len() + 1 > 0 && agent.terminate(PATIENCE).success());
}

#[test]
fn a_repository_that_was_away_gets_one_of_its_own() {
    let Some(mut rig) = rig(NO_BACKUPS) else { return };
    let offsite = rig.scratch.join("offsite");
    let both = |more: &str| {
        let url = format!("[repositories.offsite]\nurl = \"file://{}\"\n", offsite.display());
        format!("required = \"any\"\n{TAILS}{more}{url}")
    };
    let start = |rig: &Rig| {
        let config = rig.config("seawall");
        let text = fs::read_to_string(&config).expect("our file can be read");
        let text = text.replace("[\"local\"]", "[\"local\", \"offsite\"]");
        fs::write(&config, text).expect("a test's file can be written");
        Agent::start(["run", "--config", config.to_str().expect("UTF-8")])
    };
    let held_by = |backup: &Value| backup["repositories"].as_array().expect("a list").len();
    rig.settings = both(NO_BACKUPS);
    let mut agent = start(&rig);
    agent.wait_for_log("streaming", PATIENCE);
    rig.write();
    rig.wait_archived();
    assert!(agent.terminate(PATIENCE).success());

    let away = rig.scratch.join("away");
    fs::rename(&offsite, &away).expect("it can be moved");
    rig.settings = both("");
    let mut agent = start(&rig);
    let first = eventually(PATIENCE, "a backup in the one that is there", || {
        let complete = of_status(&backups(&rig), "complete");
        complete.first().cloned()
    });
    assert_eq!((held_by(&first), &first["repositories"][0]), (1, &"local".into()));
    fs::rename(&away, &offsite).expect("it can be moved");
    // What has one is not given another.
    let second = eventually(PATIENCE, "one in the other", || of_status(&backups(&rig), "complete").get(1).cloned());
    assert_eq!((held_by(&second), &second["repositories"][0]), (1, &"offsite".into()));
    assert!(agent.terminate(PATIENCE).success());
}

#[test]
fn a_gap_is_followed_by_a_backup_at_once() {
    let Some(mut rig) = rig("") else { return };
    let mut agent = rig.start();
    wait_complete(&rig, 1);
    assert!(agent.terminate(PATIENCE).success());
    rig.drop_slot();
    rig.write_much();
    rig.server.sql("checkpoint");
    rig.server.sql("select pg_switch_wal()");
    rig.server.sql("checkpoint");
    rig.settings = TAILS.to_string();
    let _agent = rig.start();
    let complete = wait_complete(&rig, 2);
    let gap = rig.facts(FactKind::Gap).pop().expect("the server no longer has it");
    assert!(lsn(&complete[1]["start_lsn"]) >= gap.to_lsn.expect("it has bounds"));
    let healed = eventually(PATIENCE, "that is written down", || rig.facts(FactKind::GapHealed).pop());
    assert_eq!(healed.healed_by.as_deref(), complete[1]["id"].as_str());
    let gaps = json(&run(&rig, &["gaps", "--json"]));
    assert_eq!((&gaps["gaps"][0]["state"], &gaps["gaps"][0]["healed_by"]), (&"healed".into(), &complete[1]["id"]));
}

/// The server finds it while it sends the file, and says so in the end: there is no backup, and everybody knows why.
#[test]
fn a_damaged_page_is_a_failed_backup_and_an_alarm() {
    let Some(major) = postgres::newest_major() else { return };
    let mut server = Server::builder(major).wal_segment_mib(1).checksums().start();
    server.sql("create table damaged as select i, md5(i::text) from generate_series(1, 10000) i");
    let file = server.sql("select pg_relation_filepath('damaged')").remove(0).remove(0);
    server.stop(postgres::Stop::Fast);
    let path = server.data_dir().join(file);
    let mut bytes = fs::read(&path).expect("the table's file can be read");
    bytes[3 * 8192 + 4000] ^= 0xFF;
    fs::write(&path, bytes).expect("the table's file can be written");
    server.start();
    let mut rig = Rig::new(server);
    rig.settings = format!("{TAILS}[http]\nlisten = \"127.0.0.1:0\"\n");
    let mut agent = rig.start();
    let address = http::address(&mut agent);
    let failed = eventually(PATIENCE, "a failed backup", || of_status(&backups(&rig), "failed").pop());
    let cause = failed["cause"].as_str().expect("a cause");
    assert!(cause.contains("damaged"), "{cause}");
    eventually(PATIENCE, "an alarm", || {
        let reasons = status_of(address, "main")["reasons"].to_string();
        (reasons.contains("there is no base backup") && reasons.contains("damaged")).then_some(())
    });
    assert_eq!(get(address, "/protected").code, 503);
    assert!(metric(&get(address, "/metrics").body, "seawall_failed_backups_total{cluster=\"main\"}") >= Some(1.0));
}

/// What lies outside the data directory comes along where the role may read it.
#[test]
fn configuration_elsewhere_is_captured() {
    let Some(major) = postgres::newest_major() else { return };
    let outside = process::Scratch::new();
    fs::write(outside.join("pg_ident.conf"), "# users\n").expect("a test's file can be written");
    process::give_to_service_user(&outside.join("pg_ident.conf"));
    let ident = outside.join("pg_ident.conf").display().to_string();
    let server = Server::builder(major).wal_segment_mib(1).setting("ident_file", &ident).start();
    let mut rig = Rig::new(server);
    rig.settings = TAILS.to_string();
    let _agent = rig.start();
    let backup = wait_complete(&rig, 1).remove(0);
    let (archive, _) = rig.archive();
    let id = backup["id"].as_str().expect("an id").parse().expect("an id");
    let record = crate::support::rig::wait_for(archive.backup_record(id)).expect("it can be read");
    let config = record.backup.expect("it is complete").config;
    assert_eq!(config.len(), 1, "{config:?}");
    assert!(config[0].path.ends_with("/pg_ident.conf") && config[0].raw_bytes == 8, "{config:?}");
}
