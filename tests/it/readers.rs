//! A cluster's repositories read together, on what a real server archived: holes that another one fills, damage, one
//! that is away, encrypted and plain objects side by side.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use seawall::codec::encrypt::{Encryptor, Identities, Recipients};
use serde_json::{Value, json};

use crate::support::agent;
use crate::support::archived::{Archived, create_journal, note, notes, zstd_decode};
use crate::support::postgres::{self, Server};
use crate::support::process::{self, Scratch};

const DEADLINE: Duration = process::DEADLINE;
/// A record over several segments of 1 MiB.
const LARGE_RECORD: &str = "select pg_logical_emit_message(true, 'large', repeat('x', 3000000))";
const IDENTITY: &str = "AGE-SECRET-KEY-1GFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPQ4EGAEX";
const BEYOND: &str = "0000000100000000000000FF";

/// What a command printed and ended with.
#[derive(Debug)]
struct Ran {
    code: i32,
    stdout: String,
    stderr: String,
}

impl Ran {
    #[track_caller]
    fn expect(self, code: i32, words: &[&str]) -> Ran {
        assert_eq!(self.code, code, "{self:?}");
        for word in words {
            assert!(self.stdout.contains(word) || self.stderr.contains(word), "no {word:?} in {self:?}");
        }
        self
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// An archive in two repositories: `offsite` is a copy of `local` as it was a while ago.
struct Place {
    server: Server,
    archived: Archived,
    scratch: Scratch,
}

impl Place {
    fn local(&self) -> PathBuf {
        self.archived.repository()
    }

    fn at(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    fn config(&self) -> String {
        self.at("seawall.toml").to_str().expect("our paths are text").to_owned()
    }

    fn configure(&self, others: &[&str], lines: &str) {
        let mut repositories = vec![("local", self.local())];
        repositories.extend(others.iter().map(|&name| (name, self.at(name))));
        let names: Vec<String> = repositories.iter().map(|(name, _)| format!("{name:?}")).collect();
        let mut text = format!(
            "[clusters.main]\npostgres = \"{}\"\nslot = \"seawall\"\nrepositories = [{}]\n{lines}\n",
            self.server.conninfo(),
            names.join(", ")
        );
        for (name, path) in repositories {
            text.push_str(&format!("[repositories.{name}]\nurl = \"file://{}\"\n", path.display()));
        }
        fs::write(self.config(), text).expect("a configuration can be written");
    }

    fn run(&self, arguments: &[&str]) -> Ran {
        let config = self.config();
        let arguments = [&["--config", config.as_str()], arguments].concat();
        let output = process::run(&mut agent::command(arguments), DEADLINE);
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("text");
        let code = output.status.code().expect("it was not killed");
        Ran { code, stdout: text(&output.stdout), stderr: text(&output.stderr) }
    }

    fn get(&self, name: &str) -> (Ran, Option<Vec<u8>>) {
        let dest = self.at("dest");
        let ran = self.run(&["wal-get", name, dest.to_str().expect("text"), "--patience", "1s"]);
        let bytes = fs::read(&dest).ok();
        let _ = fs::remove_file(&dest);
        (ran, bytes)
    }

    #[track_caller]
    fn assert_delivers(&self, name: &str, bytes: &[u8]) {
        let (ran, found) = self.get(name);
        assert_eq!(ran.code, 0, "{name}: {ran:?}");
        assert!(found.as_deref() == Some(bytes), "{name} has other bytes");
    }

    #[track_caller]
    fn assert_refuses(&self, name: &str, words: &[&str]) {
        let (ran, found) = self.get(name);
        ran.expect(255, words);
        assert_eq!(found, None);
    }
}

fn wal_files(repository: &Path) -> Vec<PathBuf> {
    let listed =
        process::run_ok(Command::new("find").arg(repository).args(["-path", "*/wal/*", "-type", "f"]), DEADLINE);
    let mut paths: Vec<PathBuf> = listed.lines().map(PathBuf::from).collect();
    paths.sort();
    paths
}

/// Names and paths of the sealed segments.
fn sealed(repository: &Path) -> Vec<(String, PathBuf)> {
    let name = |path: &Path| path.file_name()?.to_str()?.strip_suffix(".zst").map(str::to_string);
    let files = wal_files(repository).into_iter().filter_map(|path| Some((name(&path)?, path)));
    files.filter(|(name, _)| name.len() == 24).collect()
}

/// Encrypts everything that holds WAL, and has the index say so.
fn encrypt(repository: &Path) {
    let identities = Identities::parse(IDENTITY.as_bytes()).expect("it is one");
    let recipients = Recipients::parse(&identities.public_keys()).expect("they are some");
    let files = wal_files(repository);
    for path in files.iter().filter(|path| path.extension().is_some_and(|extension| extension == "zst")) {
        let mut encryptor = Encryptor::new(&recipients);
        let stored = [encryptor.push(&fs::read(path).unwrap()), encryptor.finish()].concat();
        fs::write(format!("{}.age", path.display()), stored).unwrap();
        fs::remove_file(path).unwrap();
    }
    for path in files.iter().filter(|path| path.to_string_lossy().ends_with(".index.json")) {
        let mut index: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        for entry in index["entries"].as_array_mut().unwrap() {
            let object = path.with_file_name(format!("{}.zst.age", entry["segment"].as_str().unwrap()));
            let Ok(stored) = fs::read(object) else { continue };
            entry["stored_bytes"] = json!(stored.len());
            entry["stored_crc32"] = json!(format!("{:08x}", crc32fast::hash(&stored)));
        }
        fs::write(path, index.to_string()).unwrap();
    }
}

#[test]
fn two_repositories_with_holes_restore_what_neither_could_alone() {
    let Some(major) = postgres::newest_major() else { return };
    let server = Server::builder(major).wal_segment_mib(1).start();
    let archived = Archived::of(&server);
    let mut running = archived.streaming_agent();
    let backup = server.base_backup_without_wal();
    create_journal(&server);
    server.sql(LARGE_RECORD);
    note(&server, "in both");
    archived.wait_acknowledged(&server);
    let place = Place { server, archived, scratch: Scratch::new() };
    let (local, offsite) = (place.local(), place.at("offsite"));
    process::run_ok(Command::new("cp").arg("-a").arg(&local).arg(&offsite), DEADLINE);
    place.server.sql(LARGE_RECORD);
    note(&place.server, "the last one");
    place.archived.wait_acknowledged(&place.server);
    assert!(running.terminate(DEADLINE).success());

    // What there is, while it is whole.
    place.configure(&[], "");
    let segments: Vec<(String, Vec<u8>)> =
        sealed(&local).into_iter().map(|(name, path)| (name, zstd_decode(&path))).collect();
    let in_both: Vec<(String, PathBuf)> = sealed(&offsite);
    assert!(in_both.len() >= 4 && segments.len() > in_both.len(), "{in_both:?}");
    let unfinished = place.server.current_segment();
    let end = place.get(&unfinished).1.expect("the unfinished segment is delivered");

    let lost = |repository: &Path, index: usize| fs::remove_file(&sealed(repository)[index].1).unwrap();
    lost(&offsite, 0);
    lost(&local, 1);
    let damaged = sealed(&local).remove(1).1;
    let mut bytes = fs::read(&damaged).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&damaged, bytes).unwrap();

    place.assert_refuses(&segments[1].0, &["is a hole"]);
    place.assert_refuses(&segments[2].0, &["is damaged"]);
    place.configure(&["offsite"], "");
    for (name, bytes) in &segments {
        place.assert_delivers(name, bytes);
    }
    place.assert_delivers(&unfinished, &end);
    assert_eq!(place.get(BEYOND).0.code, 1, "all have answered");
    let gaps = place.run(&["gaps", "--json"]).expect(0, &[]).json();
    let lacks: Vec<(&Value, &Value)> =
        gaps["lacks"].as_array().unwrap().iter().map(|lack| (&lack["repository"], &lack["held_by"])).collect();
    assert_eq!(gaps["gaps"], json!([]));
    assert_eq!(lacks, [(&json!("local"), &json!(["offsite"])), (&json!("offsite"), &json!(["local"]))]);
    place.run(&["gaps"]).expect(0, &["no gaps", "repository local lacks", "offsite holds it"]);
    let status = place.run(&["status", "--json"]).expect(1, &[]).json();
    let repositories = &status["clusters"][0]["repositories"];
    assert_eq!((&repositories[0]["state"], &repositories[1]["state"]), (&json!("incomplete"), &json!("incomplete")));
    assert_eq!(status["clusters"][0]["durable_lsn"], repositories[1]["frontier_lsn"], "both are required");

    // One is away: what the other has is delivered, and nothing is absent.
    fs::rename(&offsite, place.at("away")).unwrap();
    place.assert_delivers(&segments[0].0, &segments[0].1);
    place.assert_refuses(&segments[1].0, &["not every repository answered: offsite:"]);
    place.assert_refuses(&unfinished, &["is unfinished", "offsite:", "hint: "]);
    for nobody_has in [BEYOND, "00000002.history"] {
        place.assert_refuses(nobody_has, &["not every repository answered: offsite:"]);
    }
    place.run(&["gaps"]).expect(1, &["offsite of cluster main cannot be read, and may hold more"]);
    let status = place.run(&["status", "--json"]).expect(1, &[]).json();
    assert_eq!(status["clusters"][0]["repositories"][1]["state"], "unavailable");
    place.run(&["check"]).expect(1, &["PROBLEM  repository ", "offsite: "]);
    fs::rename(place.at("away"), &offsite).unwrap();

    // Another copy, encrypted.
    encrypt(&offsite);
    place.assert_refuses(&segments[1].0, &["is encrypted", "hint: set `identity_file`"]);
    let key = place.at("key.txt");
    fs::write(&key, format!("{IDENTITY}\n")).unwrap();
    place.configure(&["offsite"], &format!("identity_file = {:?}", key.to_str().unwrap()));
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    place.assert_refuses(&segments[0].0, &["is open to everybody", "chmod 0600"]);
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    for (name, bytes) in &segments {
        place.assert_delivers(name, bytes);
    }
    place.assert_delivers(&unfinished, &end);

    process::give_to_service_user(place.scratch.path());
    let config = place.config();
    let words = ["wal-get", "%f", "%p", "--config", &config];
    let command = agent::restore_command(&place.scratch, &local, &words);
    let restored = backup.recover(&command).start_recovered().expect("together they have all of it");
    assert_eq!(notes(&restored), ["in both", "the last one"]);
}

#[test]
fn an_empty_repository_beside_others_is_refused_and_made_a_copy_on_demand() {
    let Some(major) = postgres::newest_major() else { return };
    let server = Server::builder(major).wal_segment_mib(1).start();
    let archived = Archived::of(&server);
    let place = Place { server, archived, scratch: Scratch::new() };
    place.configure(&["second"], "");
    let begun = place.run(&["init", "--apply", "--json"]).expect(0, &[]).json();
    assert_eq!(begun["created"], json!(["repository", "lineage", "slot"]));
    let lineage = format!("main/{}/lineage.json", place.server.system_id());
    let file = |root: PathBuf| fs::read_to_string(root.join(&lineage)).unwrap();
    assert_eq!(file(place.local()), file(place.at("second")), "one lineage in both");

    place.configure(&["second", "third"], "");
    place.run(&["init", "--apply"]).expect(78, &["holds nothing, but other repositories hold", "init --create"]);
    assert!(!place.at("third").exists());
    place.run(&["check"]).expect(1, &["third: "]);
    let created = place.run(&["init", "--create", "--json"]).expect(0, &[]).json();
    let of_each: Vec<&Value> = created["repositories"].as_array().unwrap().iter().map(|one| &one["created"]).collect();
    assert_eq!(of_each, [&json!([]), &json!([]), &json!(["repository", "lineage"])]);
    assert_eq!(file(place.local()), file(place.at("third")));
    place.run(&["check"]).expect(1, &["all that can be read hold lineage"]);
    let again = place.run(&["init", "--create", "--json"]).expect(0, &[]).json();
    assert_eq!(again["created"], json!([]));
    place.run(&["init", "--new-lineage", "--json"]).expect(0, &[]);

    // The same directory under two names is no second copy.
    fs::remove_dir_all(place.at("third")).unwrap();
    std::os::unix::fs::symlink(place.at("second"), place.at("third")).unwrap();
    place.run(&["check"]).expect(1, &["second and third are one and the same place"]);
}
