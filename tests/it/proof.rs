//! What a restore promises, on real servers: a journal of commits is kept at the source, each with its transaction, time
//! and position; every kind of target then has to bring back exactly what the journal says was there. Each version has
//! another mixture of segment size, checksums, store, encryption and tablespaces.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use age::secrecy::ExposeSecret;
use serde_json::Value;

use crate::support::agent::{self, Agent};
use crate::support::postgres::{self, BackgroundLoad, Installation, Server, Stop};
use crate::support::process::{self, Scratch};
use crate::support::s3::{self, S3Server};

const PATIENCE: Duration = process::DEADLINE;

/// What one version's proof is made with.
#[derive(Clone, Copy, Debug)]
struct Mixture {
    major: u32,
    wal_segment_mib: u32,
    checksums: bool,
    s3: bool,
    encrypted: bool,
    tablespaces: bool,
    /// A table of more than one file.
    large: bool,
}

const PLAIN: Mixture = Mixture {
    major: 13,
    wal_segment_mib: 1,
    checksums: false,
    s3: false,
    encrypted: false,
    tablespaces: true,
    large: false,
};

#[test]
fn pg13_small_segments_and_tablespaces() {
    prove(PLAIN);
}

#[test]
fn pg14_checksums_and_encryption() {
    prove(Mixture { major: 14, wal_segment_mib: 16, checksums: true, encrypted: true, ..PLAIN });
}

#[test]
fn pg15_in_s3() {
    prove(Mixture { major: 15, wal_segment_mib: 16, s3: true, ..PLAIN });
}

#[test]
fn pg16_in_s3_encrypted() {
    prove(Mixture { major: 16, s3: true, encrypted: true, tablespaces: false, ..PLAIN });
}

#[test]
fn pg17_large_segments_and_a_large_table() {
    prove(Mixture { major: 17, wal_segment_mib: 64, checksums: true, tablespaces: false, large: true, ..PLAIN });
}

#[test]
fn pg18_as_it_comes() {
    prove(Mixture { major: 18, wal_segment_mib: 16, checksums: true, ..PLAIN });
}

/// A committed row of the journal.
#[derive(Clone, Debug)]
struct Commit {
    id: u32,
    xid: String,
    /// As the commit record has it.
    time: String,
    /// A position after its commit record, and before the next row's.
    lsn: String,
}

/// A source, its archive, and what was committed when.
struct Proof {
    mixture: Mixture,
    scratch: Scratch,
    store: Option<S3Server>,
    journal: Vec<Commit>,
}

impl Proof {
    fn new(mixture: Mixture) -> Proof {
        let scratch = Scratch::new();
        let store = mixture.s3.then(S3Server::start);
        Proof { mixture, scratch, store, journal: Vec::new() }
    }

    fn config(&self) -> PathBuf {
        self.scratch.join("seawall.toml")
    }

    /// Has agents follow this server.
    fn point_at(&self, server: &Server) {
        let mut text = format!(
            "[clusters.main]\npostgres = \"{}\"\ntail_interval = \"200ms\"\nrepositories = [\"one\"]\n",
            server.conninfo()
        );
        if self.mixture.encrypted {
            let identity = age::x25519::Identity::generate();
            let file = self.scratch.join("identity.txt");
            if !file.exists() {
                fs::write(&file, format!("# {}\n{}\n", identity.to_public(), identity.to_string().expose_secret()))
                    .expect("a key can be written");
                fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).expect("our file's mode can be set");
                process::give_to_service_user(&file);
            }
            let public = fs::read_to_string(&file).expect("the key can be read");
            let public = public.lines().next().and_then(|line| line.strip_prefix("# ")).expect("its first line");
            text += &format!("encrypt_to = [\"{public}\"]\nidentity_file = \"{}\"\n", file.display());
        }
        text += "\n[repositories.one]\n";
        match &self.store {
            None => text += &format!("url = \"file://{}\"\n", self.scratch.join("repository").display()),
            Some(store) => {
                text += &format!(
                    "url = \"s3://{}/proof\"\nendpoint = \"{}\"\nregion = \"{}\"\n",
                    s3::BUCKET,
                    store.endpoint(),
                    s3::REGION
                );
            }
        }
        fs::write(self.config(), text).expect("a configuration can be written");
    }

    fn environment(&self) -> Vec<(&'static str, String)> {
        self.store.as_ref().map_or(Vec::new(), S3Server::environment)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(agent::binary_for_servers(&self.scratch));
        command.arg("--config").arg(self.config()).args(arguments).envs(self.environment());
        process::as_service_user(agent::clean_environment(&mut command));
        command
    }

    fn seawall(&self, arguments: &[&str]) -> Output {
        process::run(&mut self.command(arguments), PATIENCE)
    }

    fn seawall_ok(&self, arguments: &[&str]) -> String {
        process::run_ok(&mut self.command(arguments), PATIENCE)
    }

    fn agent(&self) -> Agent {
        let mut agent = Agent::spawn(self.command(&["run"]));
        agent.wait_for_log("streaming", PATIENCE);
        agent
    }

    fn complete_backups(&self) -> Vec<Value> {
        let output = self.seawall(&["list", "--json"]);
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
        let backups = answer["backups"].as_array().cloned().unwrap_or_default();
        backups.into_iter().filter(|backup| backup["status"] == "complete").collect()
    }

    fn wait_for_backups(&self, count: usize, agent: &mut Agent) {
        process::eventually(PATIENCE, &format!("{count} backups are complete"), || {
            assert!(agent.is_running());
            (self.complete_backups().len() >= count).then_some(())
        });
    }

    /// Commits a row, and notes when.
    fn note(&mut self, server: &Server) -> Commit {
        let row = server.sql("insert into journal default values returning id, pg_current_xact_id()::xid").remove(0);
        let xid = row[1].clone();
        let when = format!(
            "select to_char(pg_xact_commit_timestamp('{xid}'::xid) at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS.US') || '+00', \
             pg_current_wal_flush_lsn()"
        );
        let found = server.sql(&when).remove(0);
        let commit = Commit { id: row[0].parse().expect("an id"), xid, time: found[0].clone(), lsn: found[1].clone() };
        self.journal.push(commit.clone());
        commit
    }

    fn wait_archived(&self, server: &Server) {
        let lsn = server.flush_lsn();
        let question =
            format!("select count(*) from pg_replication_slots where slot_name = 'seawall' and restart_lsn >= '{lsn}'");
        process::eventually(PATIENCE, &format!("{lsn} is archived"), || (server.value(&question) == "1").then_some(()));
    }

    /// Restores into a new directory; the server's configuration comes with it.
    fn restore(&self, name: &str, target: &[&str]) -> PathBuf {
        let pgdata = self.scratch.join(name);
        let place = pgdata.to_str().expect("our paths are text").to_string();
        let mut arguments = vec!["restore", "--pgdata", &place];
        let spaces: Vec<String> = match self.mixture.tablespaces {
            true => ["first", "second"]
                .map(|space| format!("{}={}.{space}", self.tablespace(space).display(), pgdata.display()))
                .to_vec(),
            false => Vec::new(),
        };
        spaces.iter().for_each(|space| arguments.extend(["--tablespace", space]));
        arguments.extend(target);
        self.seawall_ok(&arguments);
        // The server that recovers is started by the harness, without the store's credentials.
        if self.mixture.s3 {
            let file = pgdata.join("postgresql.auto.conf");
            let settings = fs::read_to_string(&file).expect("a restore writes its settings");
            let variables: String =
                self.environment().iter().map(|(name, value)| format!("{name}=\"{value}\" ")).collect();
            assert!(settings.contains("restore_command = '"), "{settings}");
            let settings = settings.replace("restore_command = '", &format!("restore_command = '{variables}"));
            fs::write(&file, settings).expect("our file can be written");
        }
        pgdata
    }

    fn recovered(&self, pgdata: &Path) -> Result<Server, String> {
        let server = Server::builder(self.mixture.major)
            .setting("track_commit_timestamp", "on")
            .setting("min_wal_size", "256MB");
        server.on_copy_of(pgdata).start_recovered()
    }

    fn tablespace(&self, name: &str) -> PathBuf {
        self.scratch.join(&format!("space-{name}"))
    }

    /// Restores to a target and compares with what the journal says: the rows up to `last`.
    fn assert_restores(&self, name: &str, target: &[&str], last: u32) {
        println!("{name}: restore {}", target.join(" "));
        let pgdata = self.restore(name, target);
        verify_files(self.mixture.major, &pgdata);
        let restored =
            self.recovered(&pgdata).unwrap_or_else(|log| panic!("{name} ({target:?}) does not recover:\n{log}"));
        assert_eq!(ids(&restored), (1..=last).collect::<Vec<_>>(), "{name}: {target:?}");
        assert_consistent(&restored, self.mixture);
        drop(restored);
        fs::remove_dir_all(&pgdata).expect("ours to remove");
        for space in ["first", "second"] {
            let _ = fs::remove_dir_all(format!("{}.{space}", pgdata.display()));
        }
    }
}

fn ids(server: &Server) -> Vec<u32> {
    server.sql("select id from journal order by id").into_iter().map(|row| row[0].parse().expect("an id")).collect()
}

/// What pgbench keeps, and what the source had from the beginning.
fn assert_consistent(server: &Server, mixture: Mixture) {
    let sums = "select (select sum(abalance) from pgbench_accounts) = (select coalesce(sum(delta), 0) from pgbench_history) \
                and (select sum(bbalance) from pgbench_branches) = (select coalesce(sum(delta), 0) from pgbench_history)";
    assert_eq!(server.value(sums), "t");
    assert_eq!(server.value("select count(*) from lost_in_a_crash"), "0", "unlogged tables come back empty");
    if mixture.tablespaces {
        assert_eq!(server.value("select count(*) from in_first"), "1000");
        assert_eq!(server.value("select count(*) from in_second"), "1000");
    }
    if mixture.large {
        assert_eq!(server.value("select count(*) from large where length(filler) = 800"), LARGE.to_string());
    }
    let installation = Installation::newest_with("pg_amcheck");
    // What it calls came with 14.
    if mixture.major >= 14
        && installation.has("pg_amcheck")
        && server.try_sql("create extension if not exists amcheck").is_ok()
    {
        let mut check = installation.command("pg_amcheck");
        check.arg("-h").arg(server.socket_dir()).args(["-p", &server.port().to_string(), "-U", "postgres", "postgres"]);
        process::run_ok(&mut check, PATIENCE);
    }
}

/// Rows of the large table: with its fill factor one to a page.
const LARGE: u32 = 140_000;

/// With the server's own tools, where they exist: before it is started nothing may differ from the backup's manifest.
fn verify_files(major: u32, pgdata: &Path) {
    if let Some(installation) = Installation::that_verifies(major) {
        let mut verify = installation.command("pg_verifybackup");
        // What a restore leaves for its recovery, and where it put the tablespaces.
        verify.args(["--no-parse-wal", "--ignore=seawall.restore.json", "--ignore=tablespace_map"]).arg(pgdata);
        process::run_ok(process::as_service_user(&mut verify), PATIENCE);
    }
}

/// Rows, load, and a second backup between them.
fn prove(mixture: Mixture) {
    if !postgres::is_installed(mixture.major) {
        return;
    }
    let mut proof = Proof::new(mixture);
    let mut builder = Server::builder(mixture.major).wal_segment_mib(mixture.wal_segment_mib);
    builder = builder.setting("track_commit_timestamp", "on").setting("max_wal_size", "4GB");
    builder = builder.setting("min_wal_size", "256MB");
    builder = builder.setting("archive_mode", "on").setting("archive_command", "false");
    if mixture.checksums {
        builder = builder.checksums();
    }
    let mut server = builder.start();
    server.pgbench_init(2);
    server.sql("create table journal (id serial primary key, at timestamptz default clock_timestamp())");
    server.sql("create unlogged table lost_in_a_crash as select generate_series(1, 1000) n");
    if mixture.tablespaces {
        for name in ["first", "second"] {
            let place = proof.tablespace(name);
            fs::create_dir(&place).expect("ours to make");
            process::give_to_service_user(&place);
            server.sql(&format!("create tablespace {name} location '{}'", place.display()));
            server.sql(&format!("create table in_{name} tablespace {name} as select generate_series(1, 1000) n"));
        }
    }
    if mixture.large {
        server.sql("create table large (filler text) with (fillfactor = 10)");
        server.sql(&format!("insert into large select repeat('x', 800) from generate_series(1, {LARGE})"));
        let size: u64 = server.value("select pg_relation_size('large')").parse().expect("a size");
        assert!(size > 1 << 30, "{size} bytes fit one file");
    }
    proof.point_at(&server);
    let mut agent = proof.agent();
    let load = server.pgbench_background_at(300, 240);
    (0..2).for_each(|_| drop(proof.note(&server)));
    proof.wait_for_backups(1, &mut agent);
    let early: Vec<Commit> = (0..3).map(|_| proof.note(&server)).collect();
    server.sql("select pg_create_restore_point('between the backups')");
    let named = early.last().expect("three rows").id;
    proof.note(&server);
    proof.seawall_ok(&["backup", "--label", "second"]);
    let late: Vec<Commit> = (0..3).map(|_| proof.note(&server)).collect();
    end_load(&server, load);
    let last = proof.note(&server);
    proof.wait_archived(&server);
    assert_eq!(proof.complete_backups().len(), 2);
    let window = proof.seawall_ok(&["window", "--json"]);
    assert!(window.contains("\"intervals\""), "{window}");

    let time = |commit: &Commit| commit.time.clone();
    proof.assert_restores("latest", &[], last.id);
    proof.assert_restores("time", &["--to", &time(&early[1])], early[1].id);
    proof.assert_restores("lsn", &["--to", &format!("lsn:{}", late[1].lsn)], late[1].id);
    if [13, 18].contains(&mixture.major) {
        proof.assert_restores("before-time", &["--to", &time(&early[1]), "--exclusive"], early[0].id);
        proof.assert_restores("later-time", &["--to", &time(&late[0])], late[0].id);
        proof.assert_restores("xid", &["--to", &format!("xid:{}", early[2].xid)], early[2].id);
        proof.assert_restores("before-xid", &["--to", &format!("xid:{}", late[2].xid), "--exclusive"], late[1].id);
        proof.assert_restores("name", &["--to", "name:between the backups"], named);
        proof.assert_restores("immediate", &["--to", "immediate"], immediate(&proof));
    }
    // The source was never in danger, and goes on.
    assert!(agent.is_running());
    assert_eq!(ids(&server), (1..=last.id).collect::<Vec<_>>());
    server.stop(Stop::Fast);
}

/// The last row that was committed when the newest backup had ended.
fn immediate(proof: &Proof) -> u32 {
    let backups = proof.complete_backups();
    let stop = |backup: &Value| backup["stop_lsn"].as_str().map(str::to_string).expect("a complete backup has an end");
    let stop: seawall::wal::Lsn =
        backups.iter().map(stop).map(|lsn| lsn.parse().expect("a position")).max().expect("two backups");
    let before = |commit: &&Commit| commit.lsn.parse::<seawall::wal::Lsn>().expect("a position") <= stop;
    proof.journal.iter().filter(before).map(|commit| commit.id).max().expect("rows before it")
}

fn end_load(server: &Server, load: BackgroundLoad) {
    drop(load);
    server.wait_no_load();
}

/// Restored, promoted and archived into the same repository, three times in a row: a point on each line can still be
/// restored, and nothing of one line gets into another.
#[test]
fn three_lines_of_history_in_one_repository() {
    let Some(major) = postgres::newest_major() else { return };
    let mixture = Mixture { major, tablespaces: false, ..PLAIN };
    let mut proof = Proof::new(mixture);
    let mut server = Server::builder(major).wal_segment_mib(1).setting("track_commit_timestamp", "on").start();
    server.pgbench_init(1);
    server.sql("create table journal (id serial primary key, line int, at timestamptz default clock_timestamp())");
    server.sql("create unlogged table lost_in_a_crash as select generate_series(1, 1000) n");
    proof.point_at(&server);
    let mut agent = proof.agent();
    proof.wait_for_backups(1, &mut agent);
    // On each line: what it kept of its parent, and what it added before the fork and after it.
    let mut lines: Vec<(u32, Vec<u32>, Commit)> = Vec::new();
    for line in 1..=4 {
        assert_eq!(server.timeline(), line);
        server.sql(&format!("alter table journal alter line set default {line}"));
        proof.note(&server);
        let fork = proof.note(&server);
        proof.note(&server);
        // Beyond the segment of the fork, too: it must not leak into the child.
        server.switch_wal();
        let after = proof.note(&server);
        proof.wait_archived(&server);
        lines.push((line, ids(&server), after));
        if line == 4 {
            break;
        }
        assert!(agent.terminate(PATIENCE).success());
        server.stop(Stop::Fast);
        let name = format!("line{line}");
        let pgdata = proof.restore(&name, &["--to", &fork.time]);
        server = proof.recovered(&pgdata).expect("it recovers");
        assert_eq!(ids(&server).last(), Some(&fork.id));
        proof.point_at(&server);
        agent = proof.agent();
        proof.wait_archived(&server);
    }
    for (line, expected, after) in &lines {
        let name = format!("back{line}");
        let timeline = line.to_string();
        let pgdata = proof.restore(&name, &["--timeline", &timeline, "--to", &after.time]);
        let restored = proof.recovered(&pgdata).unwrap_or_else(|log| panic!("line {line} does not recover:\n{log}"));
        assert_eq!(&ids(&restored), expected, "line {line}");
        let foreign = format!("select count(*) from journal where line > {line}");
        assert_eq!(restored.value(&foreign), "0");
    }
    let pgdata = proof.restore("newest", &[]);
    let restored = proof.recovered(&pgdata).expect("the newest line recovers");
    assert_eq!(ids(&restored), lines.last().expect("four lines").1);
}
