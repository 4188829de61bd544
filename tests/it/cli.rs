//! The command line as its users meet it: exit codes, messages, JSON, against real servers where one is installed.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::support::agent::{self, Agent, Signal};
use crate::support::postgres::{self, Server};
use crate::support::process::{self, Scratch, ServiceUser};

const DEADLINE: Duration = process::DEADLINE;

/// What a command printed and ended with.
#[derive(Debug)]
struct Ran {
    code: i32,
    stdout: String,
    stderr: String,
}

impl Ran {
    fn of(command: &mut Command) -> Ran {
        let output = process::run(command, DEADLINE);
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("text");
        Ran {
            code: output.status.code().expect("it was not killed"),
            stdout: text(&output.stdout),
            stderr: text(&output.stderr),
        }
    }

    #[track_caller]
    fn expect(&self, code: i32, words: &[&str]) -> &Ran {
        assert_eq!(self.code, code, "{self:?}");
        for word in words {
            assert!(self.stderr.contains(word), "no {word:?} in: {}", self.stderr);
        }
        self
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

fn run(arguments: &[&str]) -> Ran {
    Ran::of(&mut agent::command(arguments))
}

fn keys(value: &Value) -> BTreeSet<&str> {
    value.as_object().expect("an object").keys().map(String::as_str).collect()
}

fn set(words: &str) -> BTreeSet<&str> {
    words.split_whitespace().collect()
}

// --- Without a server --------------------------------------------------------------------------------------------

#[test]
fn help_names_every_verb_and_every_exit_code() {
    let help = run(&["--help"]);
    assert_eq!((help.code, help.stderr.as_str()), (0, ""));
    for word in ["run", "init", "check", "status", "gaps", "wal-get", "SEAWALL_CONFIG", "78 configuration", "--json"] {
        assert!(help.stdout.contains(word), "no {word} in {}", help.stdout);
    }
    for verb in ["run", "init", "check", "status", "gaps", "wal-get"] {
        let help = run(&[verb, "--help"]);
        assert!(help.code == 0 && help.stdout.contains("Usage: seawall"), "{help:?}");
    }
    assert!(run(&["--version"]).stdout.starts_with("seawall "));
}

#[test]
fn usage_errors_end_with_64_and_name_the_nearest() {
    run(&["stauts"]).expect(64, &["unrecognized subcommand 'stauts'", "'status'"]);
    run(&["run", "--untill", "0/1"]).expect(64, &["--until"]);
    run(&["run", "--until", "tomorrow"]).expect(64, &["16/B374D848"]);
    run(&[]).expect(64, &["Usage"]);
    let json = run(&["--json", "nonsense"]).expect(64, &[]).json();
    assert_eq!((&json["schema"], &json["error"]["exit_code"]), (&1.into(), &64.into()));
    assert!(json["error"]["message"].as_str().unwrap().contains("nonsense"));
}

struct ConfigFile {
    scratch: Scratch,
}

impl ConfigFile {
    fn new(text: &str) -> ConfigFile {
        let file = ConfigFile { scratch: Scratch::new() };
        fs::write(file.path(), text).expect("our file can be written");
        file
    }

    fn path(&self) -> PathBuf {
        self.scratch.join("seawall.toml")
    }

    fn check(&self) -> Ran {
        run(&["--config", self.path().to_str().unwrap(), "check"])
    }
}

const TWO_CLUSTERS: &str = "[clusters.a]\npostgres = \"host=h\"\n[clusters.b]\npostgres = \"host=h\"\n\
                            [repositories.r]\nurl = \"file:///nowhere/at/all\"\n";

#[test]
fn mistakes_in_the_configuration_say_where_and_what() {
    let config = ConfigFile::new("[clusters.main]\nsolt = \"x\"\n");
    config.check().expect(78, &["error: unknown key clusters.main.solt in", "seawall.toml:2; did you mean slot?"]);
    fs::set_permissions(config.path(), fs::Permissions::from_mode(0o664)).unwrap();
    config.check().expect(78, &["others may write it (mode 0664)", "hint: ", "chmod go-w"]);
    run(&["--config", "/no/such/file", "check"]).expect(78, &["could not read /no/such/file", "hint: is the path"]);
    let nothing = || agent::command(["status"]);
    let empty = Scratch::new();
    Ran::of(nothing().current_dir(empty.path())).expect(78, &["no configuration", "seawall init"]);
    let two = ConfigFile::new(TWO_CLUSTERS);
    let path = two.path();
    let path = path.to_str().unwrap();
    run(&["--config", path, "init", "--apply"]).expect(64, &["several clusters", "--cluster NAME"]);
    let unknown = run(&["--config", path, "--cluster", "c", "--json", "gaps"]);
    unknown.expect(64, &["there is no cluster \"c\"", "hint: configured: a, b"]);
    let error = &unknown.json()["error"];
    assert_eq!(keys(error), set("message hint exit_code"));
    assert_eq!(error["exit_code"], 64);
}

#[test]
fn a_configuration_nobody_may_read_is_a_question_of_permission() {
    if process::service_user() == ServiceUser::Ourselves {
        return; // only root can make a file another user cannot read, and run as that user
    }
    let scratch = Scratch::new();
    let path = scratch.join("seawall.toml");
    fs::write(&path, TWO_CLUSTERS).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let mut command = as_service_user(&scratch, &["--config", path.to_str().unwrap(), "gaps"]);
    Ran::of(&mut command).expect(77, &["could not read", "hint: may the user seawall runs as read"]);
}

/// Without the environment of whoever runs the tests.
fn as_service_user(scratch: &Scratch, arguments: &[&str]) -> Command {
    let mut command = Command::new(agent::binary_for_servers(scratch));
    process::as_service_user(command.env_clear().args(arguments));
    command
}

#[test]
fn init_prints_everything_without_a_configuration() {
    let scratch = Scratch::new();
    let printed = Ran::of(agent::command(["init"]).current_dir(scratch.path()));
    for line in [
        "CREATE ROLE seawall LOGIN REPLICATION PASSWORD",
        "host     replication  seawall",
        "host     postgres     seawall",
        "max_slot_wal_keep_size = ",
        "[clusters.main]",
        "url            = \"file:///var/lib/seawall\"",
        "seawall run",
    ] {
        assert!(printed.stdout.contains(line), "no {line:?} in {}", printed.stdout);
    }
    let json = Ran::of(agent::command(["init", "--json"]).current_dir(scratch.path())).json();
    assert_eq!(keys(&json), set("schema cluster sql pg_hba settings config"));
    // What it prints is a configuration.
    let config = ConfigFile::new(json["config"].as_str().unwrap());
    let again = run(&["--config", config.path().to_str().unwrap(), "init", "--json"]).json();
    assert_eq!(again["config"], json["config"]);
}

#[test]
fn wal_get_never_returns_what_postgresql_takes_for_the_end() {
    let scratch = Scratch::new();
    let root = scratch.join("repository");
    let url = format!("file://{}", root.display());
    let dest = scratch.join("dest");
    let dest = dest.to_str().unwrap();
    let name = "000000010000000000000001";
    let config = ConfigFile::new("[clusters.main]\nsolt = \"x\"\n");
    let config = config.path();
    let broken = config.to_str().unwrap();
    let mistakes: [(&[&str], &str); 9] = [
        (&["wal-get"], "required arguments"),
        (&["wal-get", name], "DEST"),
        (&["wal-get", name, dest, "--nonsense"], "--nonsense"),
        (&["--repository", "gs://bucket", "wal-get", name, dest], "not available"),
        (&["--config", broken, "wal-get", name, dest], "unknown key"),
        (&["--config", "/no/such/file", "wal-get", name, dest], "could not read /no/such/file"),
        (&["--repository", &url, "wal-get", name, dest], "is the volume mounted"),
        (&["--repository", &url, "status", "wal-get"], "wal-get"),
        (&["--repository", &url, "wal-get", "--help", name, dest], ""),
    ];
    for (arguments, words) in mistakes {
        run(arguments).expect(255, &[words]);
    }
    fs::create_dir(&root).unwrap();
    run(&["--repository", &url, "wal-get", name, dest]).expect(255, &["holds no repository of seawall's"]);
    fs::write(root.join("repository.json"), "{\"format\": 99}").unwrap();
    run(&["--repository", &url, "wal-get", name, dest]).expect(255, &["has format 99", "upgrade this one"]);
    assert_eq!(run(&["wal-get", "--help"]).code, 0);
    assert!(!Path::new(dest).exists());
}

#[test]
fn a_server_that_is_not_there_is_unavailable() {
    let scratch = Scratch::new();
    let url = format!("file://{}", scratch.join("repository").display());
    let flags = ["--postgres", "host=127.0.0.1 port=1 user=x", "--repository", &url];
    let with = |verb: &[&'static str]| run(&[&flags[..], verb].concat());
    with(&["init", "--apply"]).expect(69, &["could not connect to 127.0.0.1:1", "hint: is the server running"]);
    let status = with(&["status", "--json"]);
    let status = status.expect(1, &[]).json();
    let cluster = &status["clusters"][0];
    assert_eq!(
        (&cluster["state"], &cluster["server_lsn"], &cluster["health"]),
        (&Value::Null, &Value::Null, &"failing".into())
    );
    let check = with(&["check"]);
    assert!(check.code == 1 && check.stdout.contains("PROBLEM  replication session"), "{check:?}");
    assert!(check.stdout.contains("→ is the server running"), "{check:?}");
}

// --- With a server -----------------------------------------------------------------------------------------------

/// A server, a role for seawall, and a place for a repository.
struct Place {
    server: Server,
    scratch: Scratch,
}

const HBA: &str = "host replication seawall 127.0.0.1/32 scram-sha-256\n\
                   host all seawall 127.0.0.1/32 scram-sha-256\n\
                   host replication plain 127.0.0.1/32 trust\n\
                   host all all 127.0.0.1/32 trust\n\
                   local all all trust\nlocal replication all trust";

impl Place {
    fn new() -> Option<Place> {
        let server = Server::builder(postgres::newest_major()?).wal_segment_mib(1).setting("wal_keep_size", "64MB");
        let server = server.hba(HBA).start();
        server.sql("create role seawall login replication password 'right'");
        server.sql("create role plain login");
        Some(Place { server, scratch: Scratch::new() })
    }

    fn root(&self) -> PathBuf {
        self.scratch.join("repository")
    }

    fn conninfo(&self, user: &str) -> String {
        format!("host=127.0.0.1 port={} dbname=postgres {user}", self.server.port())
    }

    fn arguments(&self, user: &str, arguments: &[&str]) -> Vec<String> {
        let url = format!("file://{}", self.root().display());
        let flags = ["--postgres".to_string(), self.conninfo(user), "--repository".to_string(), url];
        flags.into_iter().chain(arguments.iter().map(|argument| argument.to_string())).collect()
    }

    fn run_as(&self, user: &str, arguments: &[&str]) -> Ran {
        Ran::of(&mut agent::command(self.arguments(user, arguments)))
    }

    fn run(&self, arguments: &[&str]) -> Ran {
        self.run_as("user=seawall password=right", arguments)
    }

    /// Archives everything there is now.
    fn archive(&self) {
        let until = self.server.flush_lsn().to_string();
        self.run(&["run", "--until", &until]).expect(0, &["streaming", "stopped"]);
    }
}

#[test]
fn refusals_of_the_server_name_the_cure() {
    let Some(place) = Place::new() else { return };
    for verb in [&["run"][..], &["init", "--apply"]] {
        let wrong = place.run_as("user=seawall password=wrong", verb);
        wrong.expect(77, &["error: could not connect", "28P01", "hint: the password for user seawall is wrong"]);
        place.run_as("user=seawall", verb).expect(78, &["asks user seawall for a password", "hint: "]);
        place.run_as("user=plain", verb).expect(77, &["42501", "ALTER ROLE plain REPLICATION"]);
        place.run_as("user=postgres", verb).expect(77, &["28000", "host replication postgres", "pg_hba.conf"]);
    }
    assert!(!place.root().exists(), "nothing was created for a server that refused");
}

#[test]
fn an_existing_slot_with_an_empty_repository_is_refused_and_adopted_on_demand() {
    let Some(place) = Place::new() else { return };
    place.server.create_slot("seawall");
    // The root is not there: a volume that is not mounted.
    place.run(&["run"]).expect(78, &["No such file or directory", "hint: is the volume mounted"]);
    assert!(!place.root().exists());
    fs::create_dir(place.root()).unwrap();
    for verb in [&["run"][..], &["init", "--apply"]] {
        place.run(verb).expect(78, &["slot seawall already exists on the server", "holds nothing", "init --create"]);
    }
    assert_eq!(fs::read_dir(place.root()).unwrap().count(), 0);
    place.server.switch_wal();
    let adopted = place.run(&["init", "--create", "--json"]);
    let adopted = adopted.expect(0, &[]).json();
    assert_eq!(
        keys(&adopted),
        set("schema cluster repository repositories lineage start_timeline start_lsn slot created")
    );
    assert_eq!(adopted["created"], serde_json::json!(["repository", "lineage"]));
    let again = place.run(&["init", "--create", "--json"]).expect(0, &[]).json();
    assert_eq!((&again["created"], &again["start_lsn"]), (&serde_json::json!([]), &adopted["start_lsn"]));
    place.archive();
    assert_eq!(place.run(&["gaps"]).stdout, "no gaps\n");
}

#[test]
fn another_server_is_refused_and_gets_a_lineage_of_its_own_on_demand() {
    let (Some(place), Some(other)) = (Place::new(), Place::new()) else { return };
    place.archive();
    let as_other = |arguments: &[&str]| {
        let mut arguments = other.arguments("user=seawall password=right", arguments);
        arguments[3] = format!("file://{}", place.root().display());
        Ran::of(&mut agent::command(arguments))
    };
    as_other(&["run"]).expect(78, &["system identifier is", "init --new-lineage"]);
    let check = as_other(&["check"]);
    assert!(check.code == 1 && check.stdout.contains("of other systems"), "{check:?}");
    let created = as_other(&["init", "--new-lineage", "--json"]).expect(0, &[]).json();
    assert_eq!(
        (&created["lineage"], &created["created"]),
        (&other.server.system_id().into(), &serde_json::json!(["lineage", "slot"]))
    );
    // Repeated on the first server: a second lineage, and no third while that is empty.
    for _ in 0..2 {
        let second = place.run(&["init", "--new-lineage", "--json"]).expect(0, &[]).json();
        assert_eq!(second["lineage"], format!("{}-2", place.server.system_id()));
    }
}

#[test]
fn a_repository_of_a_newer_format_is_refused() {
    let Some(place) = Place::new() else { return };
    fs::create_dir(place.root()).unwrap();
    fs::write(place.root().join("repository.json"), "{\"format\": 2, \"other\": {}}").unwrap();
    place.run(&["run"]).expect(78, &["has format 2", "a newer seawall wrote it"]);
}

#[test]
fn a_repository_that_cannot_be_written_is_a_question_of_permission() {
    let Some(place) = Place::new() else { return };
    if process::service_user() == ServiceUser::Ourselves {
        return; // root may write everywhere, and others cannot make a directory of root's
    }
    fs::create_dir(place.root()).unwrap();
    fs::set_permissions(place.root(), fs::Permissions::from_mode(0o755)).unwrap();
    let arguments = place.arguments("user=seawall password=right", &["run"]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let ran = Ran::of(&mut as_service_user(&place.scratch, &arguments));
    ran.expect(77, &["could not store file://", "Permission denied", "read and write permission"]);
}

#[test]
fn run_drains_on_sigterm_and_wal_get_delivers_what_it_archived() {
    let Some(place) = Place::new() else { return };
    let mut running = Agent::start(place.arguments("user=seawall password=right", &["run"]));
    running.wait_for_log("streaming", DEADLINE);
    // Its checkpoint would take away the segment that is compared below.
    process::eventually(DEADLINE, "the first base backup", || {
        let list = place.run(&["list", "--json"]);
        (list.code == 0 && !list.json()["backups"][0]["finished"].is_null()).then_some(())
    });
    place.server.sql("create table t as select generate_series(1, 30000)");
    let first = place.server.current_segment();
    place.server.switch_wal();
    place.server.sql("insert into t values (0)");
    let flushed = place.server.flush_lsn();
    let covered = process::eventually(DEADLINE, "status is ok", || {
        let status = place.run(&["status", "--json"]);
        let cluster = status.json()["clusters"][0].clone();
        let durable: seawall::wal::Lsn = cluster["durable_lsn"].as_str()?.parse().ok()?;
        (status.code == 0 && durable >= flushed).then_some(cluster)
    });
    let fields = "name system_id timeline state acknowledge server_lsn received_lsn proven_lsn durable_lsn \
                  acknowledged_lsn rpo_seconds lag_bytes repositories slot last_backup backup_running retention next_backup last_verify window gaps health reasons";
    assert_eq!(keys(&covered), set(fields));
    assert_eq!(keys(&covered["slot"]), set("name wal_status safe_wal_bytes hours_left"));
    assert_eq!(keys(&covered["repositories"][0]), set("name frontier_lsn state"));
    assert_eq!((&covered["state"], &covered["gaps"]), (&"streaming".into(), &0.into()));
    assert_eq!(running.terminate(DEADLINE).code(), Some(0));
    assert!(running.stderr().contains("stopped"));
    let status = place.run(&["status"]);
    assert!(status.code == 1 && status.stdout.contains("main: failing, not streaming, durable to"), "{status:?}");

    let dest = place.scratch.join("dest");
    let get = |name: &str, more: &[&str]| {
        let arguments = place.arguments("", &[&["wal-get", name, dest.to_str().unwrap()], more].concat());
        // PostgreSQL runs it in the data directory; nothing of the server's is configured there.
        Ran::of(agent::command(&arguments[2..]).current_dir(place.server.data_dir()))
    };
    assert_eq!(get(&first, &[]).code, 0);
    assert_eq!(fs::read(&dest).unwrap(), fs::read(place.server.wal_dir().join(&first)).unwrap());
    assert_eq!(get(&first, &["--timeline", "1", "--lineage", &place.server.system_id()]).code, 0);
    for absent in ["0000000100000000000000FF", "00000002.history", "000000020000000000000001"] {
        assert_eq!(get(absent, &[]).code, 1, "{absent}");
    }
    get("pg_wal", &[]).expect(255, &["restore_command = 'seawall wal-get %f %p'"]);
    get(&first, &["--lineage", "x"]).expect(255, &["is not a lineage's name"]);
    get(&first, &["--cluster", "other"]).expect(255, &["for cluster other"]);
}

#[test]
fn a_second_signal_ends_at_once() {
    let Some(place) = Place::new() else { return };
    let mut running = Agent::start(place.arguments("user=seawall password=right", &["run"]));
    running.wait_for_log("streaming", DEADLINE);
    running.signal(Signal::STOP); // so that it finds both signals at once
    running.signal(Signal::TERM);
    running.signal(Signal::INT);
    running.signal(Signal::CONT);
    let code = running.wait(DEADLINE).code();
    assert!(matches!(code, Some(0 | 130 | 143)), "{code:?}"); // 0: it had nothing left to do
}

#[test]
fn check_finds_what_is_wrong_and_leaves_nothing_behind() {
    let Some(mut place) = Place::new() else { return };
    place.server.set("synchronous_standby_names", "*");
    place.server.set("synchronous_commit", "local");
    place.server.set("wal_sender_timeout", "0");
    place.server.reload();
    fs::create_dir(place.root()).unwrap();
    let check = process::eventually(DEADLINE, "the settings hold", || {
        let check = place.run(&["check", "--json"]);
        check.stdout.contains("matches everybody").then_some(check)
    });
    let json = check.expect(1, &[]).json();
    let checks = json["clusters"][0]["checks"].as_array().unwrap().clone();
    let level = |what: &str| {
        let found = checks.iter().find(|check| check["what"] == what).unwrap_or_else(|| panic!("no {what}: {json}"));
        assert_eq!(keys(found), set("level what found cure"));
        found["level"].as_str().unwrap().to_string()
    };
    for (what, expected) in [
        ("configuration", "ok"),
        ("replication session", "ok"),
        ("role", "ok"),
        ("wal_level", "ok"),
        ("max_wal_senders", "ok"),
        ("max_slot_wal_keep_size", "warning"),
        ("wal_sender_timeout", "warning"),
        ("synchronous_standbys", "warning"),
        ("slot", "ok"),
        ("repository", "ok"),
        ("repository writable", "ok"),
        ("restore path", "ok"),
    ] {
        assert_eq!(level(what), expected, "{what}");
    }
    assert_eq!(fs::read_dir(place.root()).unwrap().count(), 0, "the probe is gone");
}

#[test]
fn gaps_are_a_finding_with_bounds() {
    let Some(place) = Place::new() else { return };
    for _ in 0..3 {
        place.archive();
        place.server.sql("create table g as select generate_series(1, 20000)");
        place.server.sql("drop table g");
        place.server.switch_wal();
    }
    place.archive();
    // The second of the sealed segments is lost, with its index entry.
    let lineage = place.root().join("main").join(place.server.system_id());
    let directory = lineage.join("wal/0000000100000000");
    let list = fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = list.collect();
    names.sort();
    let sealed: Vec<&String> = names.iter().filter(|name| name.len() == "0123456789ABCDEF01234567.zst".len()).collect();
    let lost = sealed[1].trim_end_matches(".zst");
    for name in names.iter().filter(|name| name.starts_with(lost)) {
        fs::remove_file(directory.join(name)).unwrap();
    }
    let page = place.scratch.join("gaps.html");
    let json = place.run(&["gaps", "--json", "--html", page.to_str().unwrap()]).expect(1, &[]).json();
    let gap = &json["gaps"][0];
    let fields = "id cluster lineage timeline from_lsn to_lsn bytes detected cause state healed_by";
    assert_eq!(keys(gap), set(fields));
    assert_eq!((&gap["state"], &gap["bytes"], &gap["cause"]), (&"open".into(), &(1 << 20).into(), &Value::Null));
    let page = fs::read_to_string(page).unwrap();
    assert!(page.contains("1 open, 0 healed") && page.ends_with("</html>\n"), "{page}");
    assert!(place.run(&["gaps"]).stdout.contains(gap["from_lsn"].as_str().unwrap()));
    assert!(place.run(&["status"]).stdout.contains("1 open gap(s)"));
}
