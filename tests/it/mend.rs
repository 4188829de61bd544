//! What is damaged in a repository is made whole by the agent, on real servers: from another repository, from the server
//! while it still has the WAL, and where nobody has it, there is a gap that is said and a backup behind it.
//!
//! `verify` is what finds damage; here the facts it would write are written by hand.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

use age::secrecy::ExposeSecret;
use jiff::Timestamp;
use seawall::catalog::damage::damaged_now;
use seawall::catalog::ledger::{FactKind, LedgerFact};
use seawall::catalog::store::{self, Archive};
use seawall::codec::Form;
use seawall::repository::{Key, LocalBackend};
use seawall::wal::SegmentName;
use serde_json::Value;

use crate::support::agent::{self, Agent};
use crate::support::archived::{create_journal, note, notes};
use crate::support::postgres::{self, Builder, Server};
use crate::support::process::{self, Scratch, eventually};
use crate::support::rig::{NO_BACKUPS, wait_for};

/// For whatever an agent does by itself; far more than it takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(180);

/// A server and the repositories `names` of its archive.
struct Scene {
    server: Server,
    scratch: Scratch,
    names: &'static [&'static str],
    /// Lines of `[clusters.main]`.
    settings: String,
}

impl Scene {
    fn new(prepare: impl FnOnce(Builder) -> Builder, names: &'static [&'static str], settings: &str) -> Option<Scene> {
        let builder = Server::builder(postgres::newest_major()?).wal_segment_mib(1);
        let server = prepare(builder).start();
        create_journal(&server);
        Some(Scene { server, scratch: Scratch::new(), names, settings: settings.to_string() })
    }

    /// Has everything encrypted from now on; the agent, too, could read it.
    fn encrypt(&mut self) {
        let identity = age::x25519::Identity::generate();
        let path = self.scratch.join("identity.txt");
        fs::write(&path, identity.to_string().expose_secret()).expect("a test's file can be written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("our file's mode can be set");
        process::give_to_service_user(&path);
        let (recipient, file) = (identity.to_public(), path.display());
        self.settings.push_str(&format!("encrypt_to = [\"{recipient}\"]\nidentity_file = \"{file}\"\n"));
    }

    fn root(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    /// A configuration with these repositories.
    fn config(&self, names: &[&str]) -> PathBuf {
        let path = self.scratch.join(&format!("{}.toml", names.join("-")));
        let mut text = format!(
            "[clusters.main]\npostgres = \"{}\"\nslot = \"seawall\"\nrepositories = {names:?}\n\
             tail_interval = \"200ms\"\n{}",
            self.server.conninfo(),
            self.settings,
        );
        for name in names {
            text.push_str(&format!("[repositories.{name}]\nurl = \"file://{}\"\n", self.root(name).display()));
        }
        fs::write(&path, text).expect("a test's file can be written");
        path
    }

    fn command(&self, names: &[&str], arguments: &[&str]) -> Command {
        let config = self.config(names);
        let config = ["--config", config.to_str().expect("UTF-8")];
        agent::command_as_service_user(&self.scratch, arguments.iter().chain(&config))
    }

    fn run(&self, names: &[&str], arguments: &[&str]) -> Output {
        process::run(&mut self.command(names, arguments), PATIENCE)
    }

    fn json(&self, names: &[&str], arguments: &[&str]) -> Value {
        let output = self.run(names, arguments);
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
    }

    fn agent(&self) -> Agent {
        let mut agent = Agent::spawn(self.command(self.names, &["run"]));
        agent.wait_for_log("streaming", PATIENCE);
        agent
    }

    fn stop(&self, mut agent: Agent) {
        note(&self.server, "before the stop");
        self.wait_acknowledged();
        assert!(agent.terminate(PATIENCE).success());
    }

    fn wait_acknowledged(&self) {
        let flushed = self.server.flush_lsn();
        eventually(PATIENCE, &format!("{flushed} is acknowledged"), || {
            let asked =
                format!("select restart_lsn >= '{flushed}' from pg_replication_slots where slot_name = 'seawall'");
            (self.server.value(&asked) == "t").then_some(())
        });
    }

    /// So many whole segments; the first of them.
    fn write_segments(&self, count: u32) -> SegmentName {
        self.server.switch_wal();
        note(&self.server, "the first");
        let name = self.server.current_segment();
        self.server.switch_wal();
        for number in 1..count {
            note(&self.server, &format!("segment {number}"));
            self.server.switch_wal();
        }
        self.wait_acknowledged();
        name.parse().expect("a segment's name")
    }

    fn archive(&self, repository: &str) -> Archive {
        let backend = Arc::new(LocalBackend::open(self.root(repository)));
        let mut lineages = wait_for(store::lineages(backend.as_ref(), "main")).expect("the lineages can be listed");
        assert_eq!(lineages.len(), 1, "one server has one lineage");
        Archive::new(backend, lineages.remove(0).0)
    }

    fn repository_id(&self, repository: &str) -> String {
        let archive = self.archive(repository);
        let file = wait_for(store::read_repository(archive.backend.as_ref())).expect("it can be read");
        file.expect("it is there").id
    }

    fn segment(&self, repository: &str, name: SegmentName) -> Key {
        let lineage = self.archive(repository).lineage;
        let mut keys = [Form::Plain, Form::Encrypted].into_iter().map(|form| lineage.segment(name, form));
        keys.find(|key| self.path(repository, key).exists()).expect("the segment is archived")
    }

    fn path(&self, repository: &str, key: &Key) -> PathBuf {
        self.root(repository).join(key.as_str())
    }

    /// Damages an object, and says so as `verify` does.
    fn damage(&self, repository: &str, key: &Key, how: Damage) {
        let path = self.path(repository, key);
        let fault = match how {
            Damage::Flip => {
                let mut bytes = fs::read(&path).expect("it is there");
                let middle = bytes.len() / 2;
                bytes[middle] ^= 0x10;
                rewrite(&path, &bytes);
                "its content is not what was stored"
            }
            Damage::Empty => {
                rewrite(&path, &[]);
                "it is empty"
            }
            Damage::Delete => {
                fs::remove_file(&path).expect("it is there");
                "it is not there"
            }
        };
        let archive = self.archive(repository);
        let ledger = wait_for(archive.ledger()).expect("the ledger is readable");
        let below = archive.lineage.below(key).expect("an object of the lineage");
        let fact = LedgerFact::damaged(&ledger, Timestamp::now(), below, fault);
        wait_for(archive.append_ledger(&fact, fastrand::u32(..))).expect("the ledger takes it");
        process::give_to_service_user(&self.root(repository));
    }

    fn facts(&self, repository: &str, kind: FactKind) -> Vec<LedgerFact> {
        let mut facts = wait_for(self.archive(repository).ledger()).expect("the ledger is readable");
        facts.retain(|fact| fact.kind == kind);
        facts
    }

    fn wait_mended(&self, repository: &str) {
        eventually(PATIENCE, "everything is whole again", || {
            // The agent may be writing.
            let ledger = wait_for(self.archive(repository).ledger()).ok()?;
            damaged_now(&ledger).is_empty().then_some(())
        });
    }

    /// What `wal-get` delivers from these repositories is what the server has.
    #[track_caller]
    fn assert_delivered(&self, names: &[&str], segment: SegmentName, expected: &[u8]) {
        let dest = self.scratch.join("delivered");
        let _ = fs::remove_file(&dest);
        let lineage = self.archive(names[0]).lineage.directory_name();
        let (name, dest_text) = (segment.to_string(), dest.to_str().expect("UTF-8"));
        let output = self.run(names, &["wal-get", "--lineage", &lineage, &name, dest_text]);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        assert!(fs::read(&dest).expect("it was delivered") == expected, "{name}: other bytes than the server's");
    }

    fn wal(&self, segment: SegmentName) -> Vec<u8> {
        fs::read(self.server.wal_dir().join(segment.to_string())).expect("the server still has it")
    }
}

#[derive(Clone, Copy, Debug)]
enum Damage {
    Flip,
    Empty,
    Delete,
}

fn rewrite(path: &Path, bytes: &[u8]) {
    fs::remove_file(path).expect("it is there");
    fs::write(path, bytes).expect("it can be written anew");
}

fn after(name: SegmentName, count: u32) -> SegmentName {
    SegmentName { low: name.low + count, ..name }
}

fn keeping(builder: Builder) -> Builder {
    builder.setting("wal_keep_size", "1GB")
}

#[test]
fn a_repository_is_made_whole_from_another_and_restores_alone() {
    for is_encrypted in [false, true] {
        let Some(mut scene) = Scene::new(keeping, &["a", "b"], NO_BACKUPS) else { return };
        if is_encrypted {
            scene.encrypt();
        }
        let agent = scene.agent();
        process::run_ok(&mut scene.command(&["a", "b"], &["backup", "--wait"]), PATIENCE);
        let first = scene.write_segments(6);
        scene.stop(agent);

        let (flipped, deleted) = (first, after(first, 2));
        scene.damage("a", &scene.segment("a", flipped), Damage::Flip);
        scene.damage("a", &scene.segment("a", deleted), Damage::Delete);
        let archive = scene.archive("a");
        let backup = wait_for(archive.backup_records()).expect("they can be read").pop().expect("one was taken");
        let file = backup.backup.expect("it is complete");
        let volume = &file.volumes[0];
        scene.damage("a", &archive.lineage.volume(file.id, volume.name(), volume.form), Damage::Flip);
        scene.damage("a", &archive.lineage.backup_manifest(file.id), Damage::Delete);

        // Said by the one alone; together nothing is missing.
        let gaps = scene.json(&["a"], &["gaps", "--json"]);
        let open = gaps["gaps"].as_array().expect("a list");
        assert_eq!(open.len(), 2, "{gaps}");
        assert!(open.iter().all(|gap| gap["cause"].as_str().expect("known").starts_with("damaged: ")), "{gaps}");
        let list = scene.json(&["a"], &["list", "--all", "--json"]);
        assert_eq!(list["backups"][0]["status"], "failed", "{list}");
        assert_eq!(scene.run(&["a"], &["window"]).status.code(), Some(1));
        assert!(scene.json(&["a", "b"], &["gaps", "--json"])["gaps"].as_array().expect("a list").is_empty());
        scene.assert_delivered(&["a", "b"], flipped, &scene.wal(flipped));

        let agent = scene.agent();
        scene.wait_mended("a");
        let mended = scene.facts("a", FactKind::Mended);
        assert_eq!(mended.len(), 4);
        // The one that is missing may have been copied before, as whatever a repository misses is.
        let is_missing = |fact: &&LedgerFact| fact.segments.first().is_some_and(|range| range.first == deleted);
        let b = scene.repository_id("b");
        assert!(mended.iter().all(|fact| is_missing(&fact) || fact.healed_by.as_ref() == Some(&b)), "{mended:?}");
        assert_eq!(scene.facts("a", FactKind::Gap), []);
        scene.stop(agent);

        fs::rename(scene.root("b"), scene.root("b.away")).expect("our directory can be renamed");
        assert_eq!(scene.run(&["a"], &["gaps"]).status.code(), Some(0));
        scene.assert_delivered(&["a"], flipped, &scene.wal(flipped));
        scene.assert_delivered(&["a"], deleted, &scene.wal(deleted));
        let copy = scene.scratch.join("copy");
        let pgdata = copy.to_str().expect("UTF-8");
        process::run_ok(&mut scene.command(&["a"], &["restore", "--pgdata", pgdata]), PATIENCE);
        let copy = Server::builder(scene.server.major()).on_copy_of(&copy);
        let copy = copy.start_recovered().unwrap_or_else(|log| panic!("it does not recover:\n{log}"));
        assert_eq!(notes(&copy), notes(&scene.server));
    }
}

#[test]
fn one_repository_is_made_whole_by_the_server_while_it_has_the_wal() {
    for is_encrypted in [false, true] {
        let Some(mut scene) = Scene::new(keeping, &["a"], NO_BACKUPS) else { return };
        if is_encrypted {
            scene.encrypt();
        }
        let agent = scene.agent();
        let first = scene.write_segments(6);
        scene.stop(agent);
        let damaged = [(first, Damage::Flip), (after(first, 2), Damage::Delete), (after(first, 4), Damage::Empty)];
        for (name, how) in damaged {
            scene.damage("a", &scene.segment("a", name), how);
        }
        assert_eq!(scene.json(&["a"], &["gaps", "--json"])["gaps"].as_array().expect("a list").len(), 3);
        let agent = scene.agent();
        scene.wait_mended("a");
        assert_eq!(scene.facts("a", FactKind::Mended).len(), 3);
        scene.stop(agent);
        assert_eq!(scene.run(&["a"], &["gaps"]).status.code(), Some(0));
        for (name, _) in damaged {
            scene.assert_delivered(&["a"], name, &scene.wal(name));
        }
    }
}

#[test]
fn what_nobody_has_is_a_gap_and_a_backup_follows_by_itself() {
    let few = |builder: Builder| builder.setting("max_wal_size", "2MB").setting("min_wal_size", "2MB");
    let Some(scene) = Scene::new(few, &["a"], "") else { return };
    let backups = || {
        let list = scene.json(&["a"], &["list", "--all", "--json"]);
        let all = list["backups"].as_array().cloned().unwrap_or_default();
        all.into_iter().filter(|backup| backup["status"] == "complete").count()
    };
    let agent = scene.agent();
    eventually(PATIENCE, "the first backup", || (backups() == 1).then_some(()));
    let first = scene.write_segments(8);
    let lost = after(first, 1);
    // Its segments are removed, or used again under other names, at a checkpoint the slot lets go of.
    eventually(PATIENCE, "the server lets go of a segment", || {
        scene.server.sql("checkpoint");
        note(&scene.server, "later");
        scene.server.switch_wal();
        scene.wait_acknowledged();
        (!scene.server.wal_dir().join(lost.to_string()).exists()).then_some(())
    });
    scene.stop(agent);
    scene.damage("a", &scene.segment("a", lost), Damage::Flip);
    let before = scene.json(&["a"], &["window", "--json"]);
    let interval = &before["lineages"][0]["timelines"][0]["intervals"][0];
    assert_eq!(interval["ends_because"], "gap", "{before}");

    let agent = scene.agent();
    eventually(PATIENCE, "a backup behind the gap", || (backups() == 2).then_some(()));
    let gaps = scene.facts("a", FactKind::Gap);
    assert_eq!(gaps.len(), 1, "{gaps:?}");
    assert!(gaps[0].cause.starts_with("damaged: "), "{gaps:?}");
    let healed = eventually(PATIENCE, "the gap is healed", || scene.facts("a", FactKind::GapHealed).pop());
    assert_eq!((healed.from_lsn, healed.to_lsn), (gaps[0].from_lsn, gaps[0].to_lsn));
    scene.stop(agent);
    let after = scene.json(&["a"], &["window", "--json"]);
    let intervals = after["lineages"][0]["timelines"][0]["intervals"].as_array().expect("a list").clone();
    assert_eq!(intervals.len(), 2, "{after}");
    for part in ["from", "to", "ends_because", "backups"] {
        assert_eq!(intervals[0][part], interval[part], "{after}");
    }
    assert_eq!(scene.facts("a", FactKind::Mended), []);
}
