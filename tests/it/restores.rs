//! `seawall restore` of backups that real servers made: what comes back is what the source had, what is there meanwhile
//! cannot be started, and nothing of anybody else's is touched.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use serde_json::Value;

use crate::support::agent::{self, Agent};
use crate::support::archived::{Archived, create_journal, note, notes};
use crate::support::postgres::{self, Installation, Server};
use crate::support::process::{self, Scratch};
use crate::support::s3::S3Server;
use crate::support::s3_rig::{Reach, S3Rig};

const DEADLINE: Duration = process::DEADLINE;
/// Every account's balance, whatever the order.
const BALANCES: &str = "select count(*), sum(hashtext(aid || ':' || abalance)::bigint) from pgbench_accounts";

/// A server, its archive with one backup in it, and an agent at work.
struct Scene {
    server: Server,
    archive: Archived,
    scratch: Scratch,
    _agent: Agent,
}

impl Scene {
    /// With tablespaces `fast` and `slow`, a journal, and so much of pgbench.
    fn new(major: u32, prepare: impl FnOnce(&Archived), has_checksums: bool, scale: u32) -> Scene {
        let builder = Server::builder(major).wal_segment_mib(1).setting("archive_mode", "on");
        let builder = builder.setting("archive_command", "false").setting("synchronous_standby_names", "");
        let server = if has_checksums { builder.checksums() } else { builder }.start();
        let scratch = Scratch::new();
        for name in ["fast", "slow"] {
            fs::create_dir(scratch.join(name)).expect("a directory can be made");
            process::give_to_service_user(&scratch.join(name));
            server.sql(&format!("create tablespace {name} location '{}'", scratch.join(name).display()));
            server.sql(&format!("create table in_{name} tablespace {name} as select generate_series(1, 5000) as n"));
        }
        create_journal(&server);
        server.sql("create unlogged table unlogged as select generate_series(1, 1000) as n");
        if scale > 0 {
            server.pgbench_init(scale);
        }
        // The source streams to somebody, and commits wait for nobody: the copy must do neither.
        server.sql("alter system set primary_conninfo = 'host=nowhere.invalid'");
        let archive = Archived::of(&server);
        prepare(&archive);
        let agent = archive.streaming_agent();
        let scene = Scene { server, archive, scratch, _agent: agent };
        note(&scene.server, "before");
        scene.backup();
        note(&scene.server, "after");
        scene
    }

    fn plain(major: u32) -> Scene {
        Scene::new(major, |_| (), false, 1)
    }

    /// The program, as the server's user runs it.
    fn seawall(&self, arguments: &[&str]) -> Command {
        let config = self.archive.config_argument();
        agent::command_as_service_user(&self.scratch, [arguments, &["--config", &config]].concat())
    }

    fn backup(&self) {
        process::run_ok(&mut self.seawall(&["backup", "--wait"]), DEADLINE);
    }

    fn target(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    fn mappings(&self, name: &str) -> Vec<String> {
        ["fast", "slow"]
            .iter()
            .flat_map(|tablespace| {
                let (old, new) = (self.scratch.join(tablespace), self.scratch.join(&format!("{name}-{tablespace}")));
                ["--tablespace".to_string(), format!("{}={}", old.display(), new.display())]
            })
            .collect()
    }

    fn restore_command(&self, name: &str, arguments: &[&str]) -> Command {
        let pgdata = self.target(name);
        let mappings = self.mappings(name);
        let mut words = vec!["restore", "--pgdata", pgdata.to_str().expect("our paths are text")];
        words.extend(mappings.iter().map(String::as_str));
        words.extend(arguments);
        self.seawall(&words)
    }

    fn try_restore(&self, name: &str, arguments: &[&str]) -> Output {
        process::run(&mut self.restore_command(name, arguments), DEADLINE)
    }

    /// What it says in JSON.
    fn restore(&self, name: &str, arguments: &[&str]) -> Value {
        let text = process::run_ok(&mut self.restore_command(name, &[arguments, &["--json"]].concat()), DEADLINE);
        serde_json::from_str(&text).expect("it is JSON")
    }

    fn refused(&self, name: &str, arguments: &[&str], code: i32) -> String {
        let output = self.try_restore(name, arguments);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{said}");
        said
    }

    /// Starts a copy of what was restored, and waits for the end of its recovery.
    fn recovered(&self, name: &str) -> Server {
        let copy = Server::builder(self.server.major()).on_copy_of(&self.target(name));
        copy.start_recovered().unwrap_or_else(|log| panic!("{name} does not recover:\n{log}"))
    }

    /// A server cannot be started on what is there.
    fn assert_not_startable(&self, name: &str) {
        let mut server = Server::builder(self.server.major()).on_copy_of(&self.target(name)).launch();
        process::eventually(DEADLINE, "the server gives up", || server.has_stopped().then_some(()));
        assert!(server.log().contains("could not find the database system"), "{}", server.log());
    }
}

/// Whatever the tools of PostgreSQL find wrong with a data directory, but for what a restore writes itself.
fn verify(major: u32, pgdata: &Path) {
    let Some(installation) = Installation::that_verifies(major) else {
        println!("skipped: no pg_verifybackup here reads a manifest of {major}");
        return;
    };
    let mut tool = installation.command("pg_verifybackup");
    for written in ["postgresql.auto.conf", "recovery.signal", "seawall.restore.json", "tablespace_map"] {
        tool.args(["-i", written]);
    }
    process::run_ok(tool.arg("-n").arg(pgdata), DEADLINE);
}

fn assert_private(path: &Path) {
    for entry in fs::read_dir(path).expect("it can be listed") {
        let entry = entry.expect("it can be listed");
        let stat = entry.path().symlink_metadata().expect("it is there");
        if !stat.is_symlink() {
            assert_eq!(stat.permissions().mode() & 0o077, 0, "{}", entry.path().display());
        }
        if stat.is_dir() {
            assert_private(&entry.path());
        }
    }
}

// --- What comes back -----------------------------------------------------------------------------------------------

#[test]
fn pg13_comes_back_as_it_was() {
    comes_back_as_it_was(13, true);
}

#[test]
fn pg14_comes_back_as_it_was() {
    comes_back_as_it_was(14, false);
}

#[test]
fn pg15_comes_back_as_it_was() {
    comes_back_as_it_was(15, true);
}

#[test]
fn pg16_comes_back_as_it_was() {
    comes_back_as_it_was(16, false);
}

#[test]
fn pg17_comes_back_as_it_was() {
    comes_back_as_it_was(17, true);
}

#[test]
fn pg18_comes_back_as_it_was() {
    comes_back_as_it_was(18, true);
}

fn comes_back_as_it_was(major: u32, has_checksums: bool) {
    if !postgres::is_installed(major) {
        return;
    }
    let scene = Scene::new(major, |_| (), has_checksums, 1);
    scene.server.pgbench_transactions(50);
    note(&scene.server, "the last");
    scene.archive.wait_acknowledged(&scene.server);

    let restored = scene.restore("copy", &[]);
    verify(scene.server.major(), &scene.target("copy"));
    assert_private(&scene.target("copy"));
    assert_eq!(restored["pinned"], true, "{restored}");
    let copy = scene.recovered("copy");
    assert_eq!(notes(&copy), ["before", "after", "the last"]);
    for statement in [BALANCES, "select count(*) from in_fast", "select sum(n) from in_slow"] {
        assert_eq!(copy.sql(statement), scene.server.sql(statement), "{statement}");
    }
    assert_eq!(copy.value("select count(*) from unlogged"), "0");
    for (setting, value) in [
        ("archive_mode", "off"),
        ("primary_conninfo", ""),
        ("synchronous_standby_names", ""),
        ("archive_command", "(disabled)"),
    ] {
        assert_eq!(
            copy.value(&format!("select '<' || current_setting('{setting}') || '>'")),
            format!("<{value}>"),
            "{setting}"
        );
    }
    assert_eq!(copy.timeline(), 2);
    let location = "select pg_tablespace_location(oid) from pg_tablespace where spcname = 'fast'";
    assert_eq!(copy.value(location), scene.target("copy-fast").to_str().unwrap());
    assert_eq!(copy.value("select count(*) from pg_replication_slots"), "0");
    // The marker and its pin are gone with the recovery they were for.
    process::eventually(DEADLINE, "recovery_end_command removes the marker", || {
        (!copy.data_dir().join("seawall.restore.json").exists()).then_some(())
    });
    // The source goes on in its own tablespaces.
    scene.server.sql("insert into in_fast values (0)");
    note(&scene.server, "still there");
    assert_eq!(copy.value("select count(*) from in_fast where n = 0"), "0");
}

#[test]
fn targets_end_where_they_say() {
    let Some(major) = postgres::newest_major() else { return };
    let scene = Scene::plain(major);
    note(&scene.server, "kept");
    let lsn = scene.server.flush_lsn().to_string();
    note(&scene.server, "too late");
    scene.server.sql("select pg_create_restore_point('here')");
    note(&scene.server, "the last");
    scene.archive.wait_acknowledged(&scene.server);
    for (name, to, expected) in [
        ("lsn", format!("lsn:{lsn}"), 3),
        ("name", "name:here".to_string(), 4),
        ("immediate", "immediate".to_string(), 1),
    ] {
        scene.restore(name, &["--to", &to]);
        let found = notes(&scene.recovered(name));
        assert_eq!(found, ["before", "after", "kept", "too late", "the last"][..expected], "{to}");
        // The places of the next copy's tablespaces are its own; a server's scratch directory is gone with it.
    }
}

#[test]
fn a_standby_follows_the_archive() {
    let Some(major) = postgres::newest_major() else { return };
    let scene = Scene::plain(major);
    scene.archive.wait_acknowledged(&scene.server);
    scene.restore("standby", &["--standby"]);
    let standby = Server::builder(major).on_copy_of(&scene.target("standby")).start();
    assert_eq!(standby.value("select pg_is_in_recovery()"), "t");
    note(&scene.server, "later");
    scene.server.switch_wal();
    process::eventually(DEADLINE, "the standby replays what is archived later", || {
        notes(&standby).contains(&"later".to_string()).then_some(())
    });
}

#[test]
fn the_printed_command_starts_it() {
    let Some(major) = postgres::newest_major() else { return };
    let mut scene = Scene::plain(major);
    scene.archive.wait_acknowledged(&scene.server);
    let restored = scene.restore("copy", &[]);
    // The copy has the source's port and sockets.
    scene.server.stop(postgres::Stop::Fast);
    let command = restored["start_command"].as_str().expect("it is text").to_string();
    let tools = Installation::of(major).expect("it is installed").command("pg_ctl");
    let directory = Path::new(tools.get_program()).parent().expect("a program lies somewhere").to_path_buf();
    let path = format!("{}:{}", directory.display(), std::env::var("PATH").unwrap_or_default());
    let mut shell = Command::new("sh");
    let log = scene.target("log");
    let start = command.replace(" start", &format!(" -w -t 300 -l {} start", log.display()));
    shell.arg("-c").arg(&start).env("PATH", &path);
    let stop = format!("{} -m immediate stop", command.trim_end_matches(" start"));
    process::as_service_user(&mut shell);
    let started = process::run(&mut shell, DEADLINE);
    let mut stopping = Command::new("sh");
    process::as_service_user(stopping.arg("-c").arg(stop).env("PATH", &path));
    process::run(&mut stopping, DEADLINE);
    let said = fs::read_to_string(&log).unwrap_or_default();
    assert!(started.status.success(), "{start}: {}\n{said}", String::from_utf8_lossy(&started.stderr));
    assert!(said.contains("archive recovery complete"), "{said}");
}

// --- What is there already -----------------------------------------------------------------------------------------

#[test]
fn delta_repairs_what_was_damaged() {
    let Some(major) = postgres::newest_major() else { return };
    let scene = Scene::plain(major);
    scene.archive.wait_acknowledged(&scene.server);
    scene.restore("copy", &[]);
    let said = scene.refused("copy", &[], 64);
    assert!(said.contains(&format!("PostgreSQL {major} data of system {}", scene.server.system_id())), "{said}");
    let pgdata = scene.target("copy");
    let filenode = scene.server.value("select pg_relation_filepath('pgbench_accounts')");
    let mut page = fs::read(pgdata.join(&filenode)).expect("it was restored");
    page[5000] ^= 1;
    fs::write(pgdata.join(&filenode), &page).expect("it can be damaged");
    fs::write(pgdata.join("base/superfluous"), "x").expect("it can be written");
    fs::remove_file(pgdata.join("PG_VERSION")).expect("it was restored");
    let kept = fs::metadata(pgdata.join("global/1262")).expect("it was restored").ino();
    let restored = scene.restore("copy", &["--delta"]);
    verify(scene.server.major(), &pgdata);
    assert!(!pgdata.join("base/superfluous").exists());
    assert_eq!(fs::metadata(pgdata.join("global/1262")).expect("it is there").ino(), kept);
    assert!(restored["kept_files"].as_u64() > Some(500), "{restored}");
    let copy = scene.recovered("copy");
    assert_eq!((notes(&copy), copy.sql(BALANCES)), (notes(&scene.server), scene.server.sql(BALANCES)));
}

#[test]
fn nothing_of_a_live_server_is_touched() {
    let Some(major) = postgres::newest_major() else { return };
    let scene = Scene::plain(major);
    scene.archive.wait_acknowledged(&scene.server);
    let live = scene.server.data_dir();
    let live = live.to_str().expect("our paths are text");
    for delta in [&[][..], &["--delta"]] {
        let output = process::run(&mut scene.seawall(&[&["restore", "--pgdata", live], delta].concat()), DEADLINE);
        assert_eq!(output.status.code(), Some(75), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let pgdata = scene.target("copy");
    let pgdata = pgdata.to_str().expect("our paths are text");
    let output = process::run(&mut scene.seawall(&["restore", "--pgdata", pgdata]), DEADLINE);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(64), "{said}");
    assert!(said.contains("a server uses") && said.contains("--tablespace"), "{said}");
    // A copy of the live directory has the live one's links.
    process::run_ok(Command::new("cp").args(["-aT", live, pgdata]), DEADLINE);
    fs::remove_file(scene.target("copy").join("postmaster.pid")).expect("it was copied");
    let output = process::run(&mut scene.seawall(&["restore", "--delta", "--pgdata", pgdata]), DEADLINE);
    assert_eq!(output.status.code(), Some(64), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(scene.server.value("select count(*) from in_fast"), "5000");
    note(&scene.server, "alive");
    let other = Server::builder(major).start();
    process::run_ok(Command::new("cp").arg("-a").arg(other.data_dir()).arg(scene.target("foreign")), DEADLINE);
    fs::remove_file(scene.target("foreign").join("postmaster.pid")).expect("it was copied");
    let said = scene.refused("foreign", &["--delta"], 65);
    assert!(said.contains(&other.system_id()), "{said}");
}

// --- Kills, faults -------------------------------------------------------------------------------------------------

/// Killed at any moment, it is whole or cannot be started, and --delta ends it.
#[test]
fn a_killed_restore_is_never_half_a_server() {
    let Some(major) = postgres::newest_major() else { return };
    let scene = Scene::new(major, |_| (), false, 5);
    scene.archive.wait_acknowledged(&scene.server);
    let started = std::time::Instant::now();
    scene.restore("measured", &[]);
    let whole = started.elapsed();
    let mut killed = 0;
    // Eight times; more often only where the machine has become so much faster that none was in time.
    for round in 0..100 {
        if round >= 8 && killed > 0 {
            break;
        }
        let mut restore = Agent::spawn(scene.restore_command("copy", if round == 0 { &[] } else { &["--delta"] }));
        std::thread::sleep(whole.mul_f64(fastrand::f64()));
        restore.kill9();
        let note = scene.target("copy").join("seawall.restoring.json");
        let control = scene.target("copy").join("global/pg_control");
        if control.exists() {
            continue;
        }
        killed += 1;
        if note.exists() {
            scene.assert_not_startable("copy");
        }
    }
    assert!(killed > 0, "none of them was killed in time");
    scene.restore("copy", &["--delta"]);
    verify(scene.server.major(), &scene.target("copy"));
    let copy = scene.recovered("copy");
    assert_eq!((notes(&copy), copy.sql(BALANCES)), (notes(&scene.server), scene.server.sql(BALANCES)));
}

#[test]
fn a_full_disk_is_said_and_gone_on_from() {
    let Some(major) = postgres::newest_major() else { return };
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root can mount a small disk");
        return;
    }
    let scene = Scene::plain(major);
    scene.archive.wait_acknowledged(&scene.server);
    let disk = scene.target("disk");
    fs::create_dir(&disk).expect("a directory can be made");
    // A volume that is too small is refused; one that is full of files is found out in the middle. The directory is
    // copied out of the mount, which only the shell sees.
    for (size, code, message) in [("size=2m", 69, "are free there"), ("size=1g,nr_inodes=300", 69, "no space is left")]
    {
        let restore = scene.restore_command("disk/copy", &["--owner", &owner()]);
        let words: Vec<String> = std::iter::once(restore.get_program())
            .chain(restore.get_args())
            .map(|word| format!("'{}'", word.to_str().expect("our words are text")))
            .collect();
        let disk = disk.display();
        let again = words.join(" ");
        let script = format!(
            "mount -t tmpfs -o {size} none {disk} && chmod 777 {disk} && {again}; code=$?; \
             test ! -e {disk}/copy/global/pg_control || code=1; \
             if test -e {disk}/copy/PG_VERSION || test -e {disk}/copy/seawall.restoring.json; then \
             mount -o remount,nr_inodes=100000 {disk} && {again} --delta >&2 && test -e {disk}/copy/global/pg_control || code=2; fi; exit $code"
        );
        let output = process::run(Command::new("unshare").args(["-m", "sh", "-c", &script]), DEADLINE);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{said}");
        assert!(said.contains(message), "{said}");
        for name in ["disk/copy-fast", "disk/copy-slow"] {
            let _ = fs::remove_dir_all(scene.target(name));
        }
    }
}

fn owner() -> String {
    match process::service_user() {
        process::ServiceUser::Other { uid, gid } => format!("{uid}:{gid}"),
        process::ServiceUser::Ourselves => "root".to_string(),
    }
}

#[test]
fn a_damaged_volume_comes_from_the_other_repository() {
    let Some(major) = postgres::newest_major() else { return };
    let other = Scratch::new();
    let scene = Scene::new(
        major,
        |archive| {
            let url = format!(
                "repositories = [\"local\", \"other\"]\n\n[repositories.other]\nurl = \"file://{}\"\n\n",
                other.join("r").display()
            );
            let text = fs::read_to_string(archive.config()).expect("it can be read");
            let (cluster, rest) = text.split_once("[repositories.local]").expect("there is one");
            let cluster = cluster.replace("repositories = [\"local\"]\n", "");
            let (named, further) = url.split_once("\n\n").expect("it has two parts");
            let text = format!("{cluster}{named}\n\n{further}[repositories.local]{rest}");
            fs::write(archive.config(), text).expect("it can be written");
        },
        false,
        1,
    );
    scene.archive.wait_acknowledged(&scene.server);
    let volumes = |root: &Path| {
        let found = process::run_ok(Command::new("find").arg(root).args(["-name", "*.tar.zst"]), DEADLINE);
        let mut found: Vec<PathBuf> = found.lines().map(PathBuf::from).collect();
        found.sort();
        found
    };
    let damaged = volumes(&scene.archive.repository());
    assert!(damaged.len() >= 3, "{damaged:?}");
    for (index, path) in damaged.iter().enumerate() {
        let mut bytes = fs::read(path).expect("an object can be read");
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        match index {
            0 => fs::remove_file(path).expect("it can be removed"),
            _ => fs::write(path, bytes).expect("it can be damaged"),
        }
    }
    scene.restore("copy", &[]);
    verify(scene.server.major(), &scene.target("copy"));
    assert_eq!(notes(&scene.recovered("copy")), ["before", "after"]);
    // Nobody has it whole.
    let last = volumes(&other.join("r")).pop().expect("there are volumes");
    let bytes = fs::read(&last).expect("an object can be read");
    fs::write(&last, &bytes[..bytes.len() - 1]).expect("it can be damaged");
    let said = scene.refused("none", &[], 65);
    assert!(said.contains("local: ") && said.contains("other: "), "{said}");
    scene.assert_not_startable("none");
}

#[test]
fn an_encrypted_backup_needs_its_key() {
    let Some(major) = postgres::newest_major() else { return };
    let scene = Scene::new(
        major,
        |archive| {
            let recipient = archive.new_key();
            archive.configure(&format!(
                "encrypt_to = [\"{recipient}\"]\nidentity_file = \"{}\"\n",
                archive.identity_file().display()
            ));
            let private = fs::Permissions::from_mode(0o600);
            fs::set_permissions(archive.identity_file(), private).expect("our file's mode can be set");
            process::give_to_service_user(&archive.identity_file());
        },
        false,
        1,
    );
    scene.archive.wait_acknowledged(&scene.server);
    scene.restore("copy", &[]);
    verify(scene.server.major(), &scene.target("copy"));
    assert_eq!(notes(&scene.recovered("copy")), ["before", "after"]);
    let text = fs::read_to_string(scene.archive.config()).expect("it can be read");
    let without: String =
        text.lines().filter(|line| !line.starts_with("identity_file")).map(|l| format!("{l}\n")).collect();
    fs::write(scene.archive.config(), without).expect("it can be written");
    let said = scene.refused("none", &[], 78);
    assert!(said.contains("identity_file"), "{said}");
    assert!(!scene.target("none").join("PG_VERSION").exists());
}

#[test]
fn a_backup_comes_from_an_s3_store() {
    let Some(major) = postgres::newest_major() else { return };
    let store = S3Server::start();
    let server = Server::builder(major).wal_segment_mib(1).start();
    server.pgbench_init(2);
    let rig = S3Rig::new(&server, "seawall", Reach::of(&store));
    let mut agent = rig.start();
    agent.wait_for_log("streaming", DEADLINE);
    process::run_ok(&mut rig.command(&["backup", "--wait"]), DEADLINE);
    rig.wait_archived(&mut agent);
    let pgdata = rig.scratch.join("copy");
    let pgdata = pgdata.to_str().expect("our paths are text");
    process::run_ok(&mut rig.command(&["restore", "--pgdata", pgdata, "--owner", &owner()]), DEADLINE);
    verify(server.major(), Path::new(pgdata));
}
