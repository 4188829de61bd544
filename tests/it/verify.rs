//! `seawall verify` over archives that agents made of real servers, with real backups: sound ones, damaged ones, and runs
//! that are killed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Signal;
use seawall::catalog::store::{self, Archive};
use seawall::codec::encrypt::Keys;
use seawall::repository::Backend;
use seawall::testkit::store::MemoryStore;
use seawall::verify::record::Mode;
use seawall::verify::{Progress, VerifyOptions};
use serde_json::Value;
use tokio::sync::watch;

use crate::support::agent::{self, Agent};
use crate::support::archived::{Archived, create_journal, note};
use crate::support::postgres::{Server, newest_major};
use crate::support::process;
use crate::support::rig::PATIENCE;
use crate::support::s3::S3Server;
use crate::support::s3_rig::{Reach, S3Rig};

/// A store in memory that nobody writes to any more, looked at in full, on a copy: no fault, whatever its history was.
pub async fn assert_no_fault(store: &MemoryStore, keys: &Keys, is_alone: bool) {
    let copy = MemoryStore::default();
    copy.tamper(|objects| *objects = store.objects());
    let backend: Arc<dyn Backend> = Arc::new(copy);
    for (lineage, _) in store::lineages(backend.as_ref(), "main").await.expect("lineages can be listed") {
        let archive = Archive::new(backend.clone(), lineage).with_keys(keys.clone());
        let options = VerifyOptions { mode: Mode::Full, is_alone, ..VerifyOptions::default() };
        let (progress, _watching) = watch::channel(Progress::default());
        let outcome = seawall::verify::verify(&archive, &options, &progress).await;
        assert!(outcome.failure.is_none(), "{:?}", outcome.failure);
        assert!(outcome.report.is_sound(), "{:#?}", outcome.report);
    }
}

const DEADLINE: Duration = Duration::from_secs(240);

fn server() -> Option<Server> {
    let server = Server::builder(newest_major()?).wal_segment_mib(1).start();
    create_journal(&server);
    Some(server)
}

fn fill(server: &Server) {
    server.sql("create table if not exists filler (content text)");
    server.sql("insert into filler select md5(i::text) from generate_series(1, 30000) i");
    note(server, "filled");
}

/// An archive with a backup, WAL before and behind it, and nobody who writes to it any more.
fn archived(server: &Server, is_encrypted: bool) -> Archived {
    let archive = Archived::of(server);
    if is_encrypted {
        archive.configure(&format!("encrypt_to = [\"{}\"]\n", archive.new_key()));
    }
    let mut agent = archive.streaming_agent();
    fill(server);
    let config = archive.config_argument();
    process::run_ok(&mut agent::command(["backup", "--wait", "--config", &config]), DEADLINE);
    process::give_to_service_user(&archive.repository());
    fill(server);
    archive.wait_acknowledged(server);
    assert!(agent.terminate(PATIENCE).success());
    archive
}

fn verify(archive: &Archived, arguments: &[&str]) -> Output {
    let config = archive.config_argument();
    let words = [&["verify", "--json", "--config", &config], arguments].concat();
    process::run(&mut agent::command(words), DEADLINE)
}

fn answer(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str::<Value>(&text).unwrap_or_else(|error| panic!("{error}: {output:?}"))["repositories"][0]
        .clone()
}

fn assert_sound(output: &Output) -> Value {
    let found = answer(output);
    assert_eq!(output.status.code(), Some(0), "{found:#}");
    assert_eq!((&found["complete"], &found["faults"]), (&true.into(), &Value::Array(Vec::new())), "{found:#}");
    found
}

/// The only fault's object, of a run that ends with 1.
fn faulty_object(output: &Output) -> String {
    let found = answer(output);
    assert_eq!(output.status.code(), Some(1), "{found:#}");
    let faults = found["faults"].as_array().expect("a list");
    assert_eq!(faults.len(), 1, "{found:#}");
    faults[0]["object"].as_str().expect("a path").to_owned()
}

fn files_below(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).expect("a repository can be listed") {
        let path = entry.expect("a repository can be listed").path();
        if path.is_dir() { found.extend(files_below(&path)) } else { found.push(path) }
    }
    found.sort();
    found
}

fn objects(archive: &Archived, holds: &str) -> Vec<PathBuf> {
    let is_it = |path: &PathBuf| path.to_string_lossy().contains(holds) && path.to_string_lossy().contains(".zst");
    files_below(&archive.repository())
        .into_iter()
        .filter(is_it)
        .filter(|path| !path.to_string_lossy().contains(".tail/"))
        .collect()
}

fn flip(path: &Path) {
    let mut body = fs::read(path).expect("an object can be read");
    let middle = body.len() / 2;
    body[middle] ^= 1;
    fs::write(path, body).expect("an object can be damaged");
}

/// Sound in every mode; then a segment and a volume that were read well before are damaged.
fn sound_then_damaged(is_encrypted: bool) {
    let Some(server) = server() else { return };
    let archive = archived(&server, is_encrypted);
    if is_encrypted {
        let blind = assert_sound(&verify(&archive, &["--full"]));
        assert!(blind["unexamined"].as_u64() > Some(3), "{blind:#}");
        archive.configure(&format!("identity_file = \"{}\"\n", archive.identity_file().display()));
        process::run_ok(std::process::Command::new("chmod").arg("600").arg(archive.identity_file()), DEADLINE);
    }
    let quick = assert_sound(&verify(&archive, &[]));
    assert_eq!((&quick["mode"], &quick["segments_read"]), (&"quick".into(), &0.into()));
    assert_sound(&verify(&archive, &["--sample", "50%"]));
    let full = assert_sound(&verify(&archive, &["--full", "--restart"]));
    assert_eq!((&full["segments_read"], &full["unexamined"]), (&full["segments"], &0.into()), "{full:#}");
    assert!(full["segments"].as_u64() > Some(3) && full["volumes_read"].as_u64() > Some(0), "{full:#}");

    let segment = objects(&archive, "/wal/").swap_remove(1);
    let sound = fs::read(&segment).expect("an object can be read");
    flip(&segment);
    assert_sound(&verify(&archive, &["--quick"]));
    let object = faulty_object(&verify(&archive, &["--full"]));
    assert!(segment.ends_with(&object), "{object}");
    // Known from then on, by whoever only looks; and lifted by whoever reads it well again.
    assert_eq!(faulty_object(&verify(&archive, &["--quick"])), object);
    fs::write(&segment, sound).expect("an object can be put back");
    assert_sound(&verify(&archive, &["--full"]));

    let volume = objects(&archive, "/backups/").swap_remove(0);
    flip(&volume);
    assert!(volume.ends_with(faulty_object(&verify(&archive, &["--sample", "100%"]))));
    fs::remove_file(&volume).expect("an object can be removed");
    assert!(volume.ends_with(faulty_object(&verify(&archive, &["--quick"]))));
    let text = agent::seawall(["verify", "--config", &archive.config_argument()]);
    let said = String::from_utf8_lossy(&text.stdout);
    assert!(said.contains("cannot be restored from this repository") && said.contains("do: "), "{said}");
    let status = agent::seawall(["status", "--config", &archive.config_argument()]);
    assert!(String::from_utf8_lossy(&status.stdout).contains("found 1 fault(s)"), "{status:?}");
}

#[test]
fn damage_is_found_in_a_directory() {
    sound_then_damaged(false);
}

#[test]
fn damage_is_found_in_an_encrypted_archive() {
    sound_then_damaged(true);
}

#[test]
fn a_killed_run_is_gone_on_with() {
    let Some(server) = server() else { return };
    let archive = archived(&server, false);
    let config = archive.config_argument();
    // So slow that it is under way when the first word of it is in the ledger.
    let words = ["verify", "--full", "--max-rate", "16KiB", "--config", &config];
    let mut slow = Agent::start(words);
    process::eventually(DEADLINE, "the ledger says how far it is", || {
        let facts = files_below(&archive.repository());
        facts.iter().any(|path| path.to_string_lossy().contains("-verify-")).then_some(())
    });
    slow.kill9();
    let next = assert_sound(&verify(&archive, &["--full"]));
    assert!(!next["resumed"].is_null(), "{next:#}");
    assert!(next["segments_read"].as_u64() < next["segments"].as_u64(), "{next:#}");
    let after = assert_sound(&verify(&archive, &["--full"]));
    assert_eq!((&after["resumed"], &after["segments_read"]), (&Value::Null, &after["segments"]), "{after:#}");
}

#[test]
fn a_store_that_is_away_is_no_fault() {
    let Some(server) = server() else { return };
    let store = S3Server::start();
    let rig = S3Rig::new(&server, "seawall", Reach::of(&store));
    let mut agent = rig.start();
    agent.wait_for_log("streaming", PATIENCE);
    fill(&server);
    process::run_ok(&mut rig.command(&["backup", "--wait"]), DEADLINE);
    fill(&server);
    rig.wait_archived(&mut agent);
    // It goes on: what is looked at changes meanwhile.
    assert_sound(&process::run(&mut rig.command(&["verify", "--full", "--json"]), DEADLINE));
    let named = process::run(&mut rig.command(&["verify", "--repository", "offsite", "--json"]), DEADLINE);
    assert_sound(&named);
    let unknown = process::run(&mut rig.command(&["verify", "--repository", "elsewhere"]), DEADLINE);
    assert_eq!(unknown.status.code(), Some(64), "{unknown:?}");
    let drill = process::run(&mut rig.command(&["verify", "--drill"]), DEADLINE);
    assert_eq!(drill.status.code(), Some(64), "{drill:?}");
    agent.signal(Signal::KILL);
    store.down();
    let away = process::run(&mut rig.command(&["verify"]), DEADLINE);
    assert_eq!(away.status.code(), Some(69), "{away:?}");
}
