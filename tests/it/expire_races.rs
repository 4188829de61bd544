//! `expire --apply` as processes, on an S3 store: what it deletes and what it is refused; stopped and killed at its steps
//! while a backup, a restore or another expiry goes on. Whatever happens, what is kept comes back and verifies.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

use bytes::Bytes;
use serde_json::Value;

use crate::support::agent::{self, Agent, Signal};
use crate::support::archived::{create_journal, note, notes};
use crate::support::postgres::{self, Server};
use crate::support::process::{self, eventually};
use crate::support::s3::{BUCKET, Fault, Operation, Rule, S3Server};
use crate::support::s3_rig::{Reach, S3Rig};

const DEADLINE: std::time::Duration = process::DEADLINE;
const NEWEST_ONLY: &str = "retention.count = 1\n";
const BY_HAND: &str = "retention.automatic = false\n";
/// For an agent and a backup of each archive at the same time; a copy may have no fewer.
const SENDERS: &str = "20";

fn server() -> Option<Server> {
    let server = Server::builder(postgres::newest_major()?).wal_segment_mib(1);
    let server = server.setting("max_wal_senders", SENDERS).setting("max_replication_slots", "20").start();
    create_journal(&server);
    Some(server)
}

/// An archive in a store of its own: two backups, of which [`NEWEST_ONLY`] keeps one.
struct Scene<'a> {
    name: &'static str,
    store: &'a S3Server,
    rig: S3Rig<'a>,
    agent: Agent,
    backups: Vec<String>,
}

impl<'a> Scene<'a> {
    fn new(server: &'a Server, store: &'a S3Server, name: &'static str) -> Scene<'a> {
        let mut rig = S3Rig::new(server, name, Reach::of(store));
        rig.settings = format!("{BY_HAND}{NEWEST_ONLY}");
        let mut agent = rig.start();
        agent.wait_for_log("streaming", DEADLINE);
        let mut scene = Scene { name, store, rig, agent, backups: Vec::new() };
        scene.back_up();
        scene.back_up();
        scene
    }

    fn back_up(&mut self) {
        let text = process::run_ok(&mut self.seawall(&["backup", "--wait", "--json"]), DEADLINE);
        let answer: Value = serde_json::from_str(&text).expect("it is JSON");
        self.backups.push(answer["id"].as_str().expect("it has an id").to_owned());
        self.write();
    }

    /// A note that is archived, in a segment that is complete.
    fn write(&mut self) {
        note(self.rig.server, &self.last_note());
        self.rig.server.switch_wal();
        self.rig.wait_archived(&mut self.agent);
    }

    fn last_note(&self) -> String {
        format!("{} after {}", self.name, self.backups.len())
    }

    /// The program as the service user runs it, whose servers fetch with it.
    fn seawall(&self, arguments: &[&str]) -> Command {
        let ours = self.rig.command(arguments);
        let mut command = agent::command_as_service_user(&self.rig.scratch, ours.get_args());
        for (name, value) in ours.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        process::run(&mut self.seawall(arguments), DEADLINE)
    }

    #[track_caller]
    fn answer(&self, arguments: &[&str]) -> Value {
        let text = process::run_ok(&mut self.seawall(&[arguments, &["--json"]].concat()), DEADLINE);
        serde_json::from_str(&text).expect("it is JSON")
    }

    /// An expiry that is stopped where `rule` met it.
    fn stopped_expiry(&self, rule: Rule) -> Agent {
        self.stopped(self.seawall(&["expire", "--apply", "--json"]), rule)
    }

    /// A process whose request, which `rule` met, was never answered, and that is stopped there. The store is honest again.
    fn stopped(&self, command: Command, rule: Rule) -> Agent {
        let known = self.store.faulted();
        let rule = self.store.fault(rule);
        let mut process = Agent::spawn(command);
        eventually(DEADLINE, "the step is reached", || {
            assert!(process.is_running(), "{}: it ended before:\n{}", self.name, process.stdout());
            (self.store.faulted() > known).then_some(())
        });
        process.signal(Signal::STOP);
        let stat = format!("/proc/{}/stat", process.pid());
        eventually(DEADLINE, "it is stopped", || {
            let stat = fs::read_to_string(&stat).expect("it is there");
            let (_, state) = stat.rsplit_once(") ").expect("the state follows the name");
            state.starts_with('T').then_some(())
        });
        self.store.clear(rule);
        process
    }

    /// An expiry stopped where `rule` met it, and a pin on the oldest backup by one that has not seen its announcement:
    /// it knew none when it began, and is gone before it looked again.
    fn stopped_beside_a_pin(&self, rule: Rule) -> Agent {
        let pin = self.seawall(&["pin", &self.backups[0]]);
        let mut pin = self.stopped(pin, Rule::new(Fault::Hang).on(Operation::PutObject).key("/pins/"));
        let expiry = self.stopped_expiry(rule);
        let look = self.store.fault(Rule::new(Fault::Hang).on(Operation::GetObject).key("-expired-"));
        pin.signal(Signal::CONT);
        eventually(DEADLINE, "the pin is there", || {
            self.store.objects().keys().any(|key| key.contains("/pins/")).then_some(())
        });
        pin.kill9();
        self.store.clear(look);
        expiry
    }

    /// It goes on, finds that it is another's turn, and deletes nothing more.
    #[track_caller]
    fn resume_in_vain(&self, mut expiry: Agent) {
        let before = self.deletions();
        expiry.signal(Signal::CONT);
        let ended = expiry.wait(DEADLINE);
        assert_eq!(ended.code(), Some(75), "{}: {}{}", self.name, expiry.stdout(), expiry.stderr());
        assert_eq!(self.deletions(), before, "{}: it deleted", self.name);
    }

    /// Requests that deleted something of a backup or of the WAL.
    fn deletions(&self) -> Vec<String> {
        let requests = self.store.requests().into_iter().filter(|seen| !seen.is_faulted);
        let of_backups = requests.filter(|seen| match seen.operation {
            Operation::DeleteObject => seen.key.contains("/backups/"),
            _ => false,
        });
        of_backups.map(|seen| seen.key).collect()
    }

    fn objects_of(&self, backup: &str) -> Vec<String> {
        let part = format!("/backups/{backup}/");
        self.store.objects().into_keys().filter(|key| key.contains(&part)).collect()
    }

    fn pgdata(&self, name: &str) -> PathBuf {
        self.rig.scratch.join(name)
    }

    fn restore(&self, name: &str, arguments: &[&str]) -> Command {
        let pgdata = self.pgdata(name);
        let words = ["restore", "--pgdata", pgdata.to_str().expect("our paths are text")];
        self.seawall(&[&words, arguments].concat())
    }

    /// What cannot be had is refused whole.
    #[track_caller]
    fn refuses_to_restore(&self, name: &str, arguments: &[&str]) {
        let refused = process::run(&mut self.restore(name, arguments), DEADLINE);
        let said = String::from_utf8_lossy(&refused.stderr);
        assert!(matches!(refused.status.code(), Some(1 | 75)), "{}: {}: {said}", self.name, refused.status);
        let left = fs::read_dir(self.pgdata(name)).map_or(0, Iterator::count);
        assert_eq!(left, 0, "{}: something is half there", self.name);
    }

    /// Starts what was restored: its notes.
    #[track_caller]
    fn notes_of(&self, name: &str) -> Vec<String> {
        let ours = self.rig.command(&[]);
        let mut builder = Server::builder(self.rig.server.major()).setting("max_wal_senders", SENDERS);
        for (name, value) in ours.get_envs() {
            let Some(value) = value else { continue };
            builder = builder.environment(name.to_str().expect("text"), value.to_str().expect("text"));
        }
        let copy = builder.on_copy_of(&self.pgdata(name)).start_recovered();
        notes(&copy.unwrap_or_else(|log| panic!("{}: {name} does not recover:\n{log}", self.name)))
    }

    /// Every one of these backups comes back by itself.
    #[track_caller]
    fn comes_back_from(&self, backup: &str) {
        let name = format!("from-{backup}");
        process::run_ok(&mut self.restore(&name, &["--backup", backup, "--to", "immediate"]), DEADLINE);
        self.notes_of(&name);
    }

    /// These are complete, no others are; the newest instant can be had, nothing is amiss.
    #[track_caller]
    fn assert_sound(&self, expected: &[&String]) {
        let list = self.answer(&["list"]);
        let all = list["backups"].as_array().expect("a list");
        let left: Vec<&str> = all.iter().filter_map(|it| it["id"].as_str()).collect();
        assert_eq!(left, expected.iter().map(|id| id.as_str()).collect::<Vec<_>>(), "{}: {list:#}", self.name);
        let verified = self.run(&["verify", "--full"]);
        assert!(verified.status.success(), "{}: {verified:?}", self.name);
        let gaps = self.run(&["gaps"]);
        assert!(gaps.status.success(), "{}: {gaps:?}", self.name);
        process::run_ok(&mut self.restore("newest", &[]), DEADLINE);
        assert!(self.notes_of("newest").contains(&self.last_note()), "{}", self.name);
    }
}

/// The decision about an announcement, before it is there.
fn announced() -> Rule {
    Rule::new(Fault::Hang).on(Operation::PutObject).key("expiry-decision")
}

/// The first object of a backup.
fn begun() -> Rule {
    Rule::new(Fault::Hang).on(Operation::DeleteObject).key("/begin.json")
}

/// Behind all of a backup's volumes.
fn half_deleted() -> Rule {
    Rule::new(Fault::Hang).on(Operation::DeleteObject).key("/backup.json")
}

// --- A store -----------------------------------------------------------------------------------------------------

/// Another tool's object, wherever it likes.
fn plant(store: &S3Server, key: &str) {
    let mut content = store.content();
    let objects = &mut content.buckets.get_mut(BUCKET).expect("our bucket").objects;
    let mut stored = objects.values().next().expect("there is something").clone();
    stored.body = Bytes::from_static(b"another tool's");
    objects.insert(key.to_owned(), stored);
}

#[test]
fn a_store_lets_go_what_expires_and_nothing_else() {
    let Some(server) = server() else { return };
    let store = S3Server::start();
    let mut scene = Scene::new(&server, &store, "applied");
    let (old, new) = (&scene.backups[0].clone(), &scene.backups[1].clone());
    let lineage = scene.rig.lineage(&store).0.directory();
    let wal = scene.store.objects().into_keys().find(|key| key.contains("/wal/") && key.ends_with(".zst"));
    let wal = wal.expect("there is a segment").rsplit_once('/').expect("in a directory").0.to_owned();
    let strangers = [
        "another-tool.txt".to_owned(),
        "some/another-tool/0000000100000000000000001.zst".to_owned(),
        "some/prefix/another-tool.txt".to_owned(),
        format!("some/prefix/{lineage}/another-tool/file"),
        format!("{wal}/000000010000000000000001.bak"),
        format!("some/prefix/{lineage}/backups/{old}/notes.txt"),
        format!("some/prefix/{lineage}/ledger/notes.txt"),
    ];
    strangers.iter().for_each(|key| plant(&store, key));

    // Without the right to delete: said, nothing announced, nothing lost.
    let names = || store.objects().into_keys().filter(|key| !key.contains("/lease/")).collect::<Vec<_>>();
    let before = scene.objects_of(old);
    store.deny("s3:DeleteObject");
    let refused = scene.run(&["expire", "--apply"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(77), "{said}");
    assert!(said.contains("right to delete"), "{said}");
    store.heal();
    assert!(names().iter().all(|key| !key.contains("-expired-") && !key.contains("expiry-decision")));
    assert_eq!(scene.objects_of(old), before);

    // A typo in the prefix.
    let bucket = std::mem::replace(&mut scene.rig.reach.bucket, format!("{BUCKET}/prefiks"));
    let refused = scene.run(&["expire", "--apply"]);
    scene.rig.reach.bucket = bucket;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(78), "{said}");
    assert!(said.contains("prefiks/some/prefix holds no repository of seawall's"), "{said}");

    store.forget_requests();
    let done = scene.answer(&["expire", "--apply"]);
    let freed = &done["repositories"][0]["freed"];
    assert_eq!(freed["backups"], 1, "{done:#}");
    assert!(freed["segments"].as_u64() > Some(0), "{done:#}");
    assert!(store.count(Operation::DeleteObjects) > 0);
    assert_eq!(scene.objects_of(old), [strangers[5].as_str()]);
    let left = store.objects();
    strangers.iter().for_each(|key| assert!(left.contains_key(key), "{key}"));
    scene.assert_sound(&[new]);
    scene.comes_back_from(new);
}

// --- Others meanwhile --------------------------------------------------------------------------------------------

#[test]
fn whatever_meets_an_expiry_that_stands_still_loses_nothing() {
    let Some(server) = server() else { return };
    type Play = fn(Scene<'_>);
    let scenes: [(&str, Play); 6] = [
        ("overtaken", a_backup_and_another_expiry_overtake_one_that_has_announced),
        ("withdrawn", what_was_announced_is_kept_after_all),
        ("confirmed", what_was_confirmed_goes),
        ("too_late", a_pin_that_comes_too_late_is_refused),
        ("killed", a_killed_one_is_finished_by_the_next),
        ("pinned", a_restore_under_way_keeps_its_backup),
    ];
    // Each waits for a lease to end, most of the time.
    std::thread::scope(|scope| {
        for (name, play) in scenes {
            let server = &server;
            scope.spawn(move || {
                let store = S3Server::start();
                play(Scene::new(server, &store, name));
            });
        }
    });
}

fn a_backup_and_another_expiry_overtake_one_that_has_announced(mut scene: Scene<'_>) {
    let expiry = scene.stopped_expiry(announced());
    let old = scene.backups[0].clone();
    scene.refuses_to_restore("old", &["--backup", &old, "--to", "immediate"]);
    process::run_ok(&mut scene.restore("meanwhile", &[]), DEADLINE);
    // It waits until the lease is nobody's.
    scene.back_up();
    // The one before stays for the restore, whose server has yet to recover.
    let done = scene.answer(&["expire", "--apply"]);
    assert_eq!(done["repositories"][0]["freed"]["backups"], 1, "{done:#}");
    scene.resume_in_vain(expiry);
    assert!(scene.objects_of(&old).is_empty());
    assert!(!scene.notes_of("meanwhile").is_empty());
    scene.assert_sound(&[&scene.backups[1], &scene.backups[2]]);
}

fn what_was_announced_is_kept_after_all(scene: Scene<'_>) {
    let expiry = scene.stopped_beside_a_pin(announced());
    let kept = scene.answer(&["expire", "--apply"]);
    assert_eq!(kept["repositories"][0]["freed"]["backups"], 0, "{kept:#}");
    scene.resume_in_vain(expiry);
    scene.comes_back_from(&scene.backups[0]);
    scene.assert_sound(&[&scene.backups[0], &scene.backups[1]]);
}

/// The stopped one has a request on its way: what it has confirmed goes, whoever was about to pin it. The pin's own process
/// would have seen that, and said so.
fn what_was_confirmed_goes(scene: Scene<'_>) {
    let expiry = scene.stopped_beside_a_pin(begun());
    let old = &scene.backups[0];
    let gone = scene.answer(&["expire", "--apply"]);
    assert_eq!(gone["repositories"][0]["freed"]["backups"], 1, "{gone:#}");
    scene.resume_in_vain(expiry);
    assert!(scene.objects_of(old).is_empty());
    scene.assert_sound(&[&scene.backups[1]]);
}

/// Whoever is told that a backup is pinned keeps it.
fn a_pin_that_comes_too_late_is_refused(scene: Scene<'_>) {
    let old = &scene.backups[0];
    let pin = scene.seawall(&["pin", old]);
    let mut pin = scene.stopped(pin, Rule::new(Fault::Hang).on(Operation::PutObject).key("/pins/"));
    let mut expiry = scene.stopped_expiry(announced());
    pin.signal(Signal::CONT);
    assert_eq!(pin.wait(DEADLINE).code(), Some(75), "{}", pin.stderr());
    assert!(pin.stderr().contains("expire"), "{}", pin.stderr());
    expiry.kill9();
    scene.answer(&["expire", "--apply"]);
    assert!(scene.objects_of(old).is_empty());
    scene.assert_sound(&[&scene.backups[1]]);
}

fn a_killed_one_is_finished_by_the_next(scene: Scene<'_>) {
    let mut expiry = scene.stopped_expiry(half_deleted());
    expiry.kill9();
    let (old, new) = (&scene.backups[0], &scene.backups[1]);
    let left = scene.objects_of(old);
    assert!(left.len() == 2 && left.iter().all(|key| key.ends_with(".json")), "{left:?}");
    scene.refuses_to_restore("old", &["--backup", old, "--to", "immediate"]);
    scene.answer(&["expire", "--apply"]);
    assert!(scene.objects_of(old).is_empty());
    scene.assert_sound(&[new]);
}

fn a_restore_under_way_keeps_its_backup(scene: Scene<'_>) {
    let known = scene.store.faulted();
    let old = &scene.backups[0];
    // Its pin is there before the first volume.
    let volumes = Rule::new(Fault::Hang).on(Operation::GetObject).key(".tar.");
    let rule = scene.store.fault(volumes);
    let mut restore = Agent::spawn(scene.restore("old", &["--backup", old]));
    eventually(DEADLINE, "volumes are fetched", || (scene.store.faulted() > known).then_some(()));
    restore.signal(Signal::STOP);
    scene.store.clear(rule);
    let planned = scene.answer(&["expire", "--apply"]);
    assert_eq!(planned["repositories"][0]["freed"]["backups"], 0, "{planned:#}");
    restore.signal(Signal::CONT);
    let ended = restore.wait(DEADLINE);
    assert!(ended.success(), "{}", restore.stderr());
    assert!(scene.notes_of("old").contains(&scene.last_note()));
    scene.assert_sound(&[old, &scene.backups[1]]);
}
