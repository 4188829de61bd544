//! Owns: real PostgreSQL servers from target/servers: clusters, their crashes, standbys, backups, recoveries, load.
//! Does not own: installing them (`tests/servers/install`), processes and directories (`process.rs`).
//!
//! ```ignore
//! let server = Server::builder(17).wal_segment_mib(1).setting("wal_keep_size", "64MB").start();
//! server.sql("create table t (i int)");
//! let backup = server.base_backup();
//! let restored = backup.recover(&restore_command).start_recovered().expect("it recovers");
//! ```

use std::fs::{self, File};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use seawall::wal::Lsn;

use super::model_clock::ModelClock;
use super::process::{self, Reaped, Scratch};

/// For one statement of a test, one tool.
const STATEMENT_DEADLINE: Duration = process::DEADLINE;
const START_DEADLINE: Duration = process::DEADLINE;
const STOP_DEADLINE: Duration = process::DEADLINE;
/// A recovery fetches every segment by a command of its own.
const RECOVERY_DEADLINE: Duration = process::DEADLINE;

const FIELD_SEPARATOR: &str = "\x1f";
const RECORD_SEPARATOR: &str = "\x1e";

// --- Installations ---------------------------------------------------------------------------------------------

/// One PostgreSQL under target/servers; some are complete, some have a server only.
#[derive(Clone, Debug)]
pub struct Installation {
    pub major: u32,
    directory: PathBuf,
}

impl Installation {
    pub fn of(major: u32) -> Option<Installation> {
        let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/servers");
        let servers = std::env::var_os("SEAWALL_SERVERS").map_or(default, PathBuf::from);
        let directory = servers.join(major.to_string()).canonicalize().ok()?;
        directory.join("bin/postgres").exists().then_some(Installation { major, directory })
    }

    /// One whose server speaks TLS: some of the complete ones do not, and have such a one beside them.
    pub fn with_tls(major: u32) -> Option<Installation> {
        let plain = Installation::of(major)?;
        let beside = plain.directory.with_file_name(format!("{major}-tls"));
        let named = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("target/servers/{major}-tls"));
        let candidates = [named, beside].into_iter().filter_map(|path| path.canonicalize().ok());
        let beside = candidates.map(|directory| Installation { major, directory });
        beside.chain([plain]).find(|one| one.directory.starts_with("/usr") || one.has_library("libssl"))
    }

    fn has_library(&self, prefix: &str) -> bool {
        let entries = fs::read_dir(self.directory.join("lib"));
        entries.is_ok_and(|mut entries| {
            entries.any(|entry| entry.is_ok_and(|entry| entry.file_name().to_string_lossy().starts_with(prefix)))
        })
    }

    /// Where the newest libpq that speaks TLS lies, for a client that is told so by `LD_LIBRARY_PATH`; `None` for the
    /// distribution's own.
    pub fn newest_libpq() -> Option<PathBuf> {
        let newest = (14..=18).rev().find_map(Installation::with_tls)?;
        (!newest.directory.starts_with("/usr")).then(|| newest.directory.join("lib"))
    }

    /// The newest one with a tool. Clients talk to all older servers; an older `pg_basebackup` refuses newer ones.
    pub fn newest_with(tool: &str) -> Installation {
        let mut found = available_majors().into_iter().rev().filter_map(Installation::of);
        found.find(|one| one.has(tool)).unwrap_or_else(|| panic!("no {tool} here: run tests/servers/install"))
    }

    /// One whose pg_verifybackup reads the manifests of `major` (version 2 came with 17), and runs: a relocated program
    /// may not.
    pub fn that_verifies(major: u32) -> Option<Installation> {
        let candidates = available_majors().into_iter().filter(|&tool| tool >= major.min(17));
        let runs = |installation: &Installation| {
            let mut version = installation.command("pg_verifybackup");
            process::run(version.arg("--version"), STATEMENT_DEADLINE).status.success()
        };
        let candidates = candidates.filter_map(Installation::of);
        candidates.filter(|installation| installation.has("pg_verifybackup")).find(runs)
    }

    pub fn has(&self, tool: &str) -> bool {
        self.directory.join("bin").join(tool).exists()
    }

    /// One of its programs, run as the service user with nothing of our own `PG*` environment.
    pub fn command(&self, tool: &str) -> Command {
        let mut command = Command::new(self.directory.join("bin").join(tool));
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("PG")) {
            command.env_remove(name);
        }
        command.env("LC_ALL", "C").env("TZ", "UTC");
        if !self.directory.starts_with("/usr") {
            command.env("LD_LIBRARY_PATH", self.directory.join("lib")); // relocated: its libraries travel with it
        }
        process::as_service_user(&mut command);
        command
    }
}

pub fn available_majors() -> Vec<u32> {
    (13..=18).filter(|major| Installation::of(*major).is_some()).collect()
}

/// Whether to go on with a test of this major; says so when not.
pub fn is_installed(major: u32) -> bool {
    let is_there = Installation::of(major).is_some();
    if !is_there {
        println!("skipped: PostgreSQL {major} is not installed");
    }
    is_there
}

/// For tests that need some server, no matter which: the newest.
pub fn newest_major() -> Option<u32> {
    let newest = available_majors().pop();
    if newest.is_none() {
        println!("skipped: no PostgreSQL is installed");
    }
    newest
}

// --- Making a server -------------------------------------------------------------------------------------------

/// A server to be: a new cluster, or one from a backup.
#[derive(Clone, Debug)]
pub struct Builder {
    major: u32,
    wal_segment_mib: u32,
    has_checksums: bool,
    has_tls: bool,
    port: Option<u16>,
    settings: Vec<(String, String)>,
    hba: Option<String>,
    origin: Option<PathBuf>,
    /// Keeps a backup of our own making on disk until it is copied.
    origin_backup: Option<Arc<BaseBackup>>,
    signal_file: Option<&'static str>,
    clock: Option<Arc<ModelClock>>,
    environment: Vec<(String, String)>,
}

impl Builder {
    /// 16 if not set, as `initdb` does. Small segments make tests cross their edges soon.
    pub fn wal_segment_mib(mut self, mib: u32) -> Builder {
        self.wal_segment_mib = mib;
        self
    }

    /// A line of postgresql.conf; the last of the same name wins.
    pub fn setting(mut self, name: &str, value: &str) -> Builder {
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }

    pub fn checksums(mut self) -> Builder {
        self.has_checksums = true;
        self
    }

    /// A server that can speak TLS, if it is told to.
    pub fn tls_capable(mut self) -> Builder {
        self.has_tls = true;
        self
    }

    /// A fixed port; without it a free one is found.
    pub fn port(mut self, port: u16) -> Builder {
        self.port = Some(port);
        self
    }

    /// Lines of pg_hba.conf for everyone but `postgres` on the socket, whom the harness needs; default: trust.
    pub fn hba(mut self, lines: &str) -> Builder {
        self.hba = Some(lines.to_owned());
        self
    }

    /// Starts from a copy of a backup (or a restored directory) instead of a new cluster.
    /// Its postgresql.auto.conf and signal files stay; postgresql.conf and pg_hba.conf become ours.
    pub fn on_copy_of(mut self, data: &Path) -> Builder {
        self.origin = Some(data.to_owned());
        self
    }

    /// Puts `recovery.signal` or `standby.signal` in place.
    pub fn signal_file(mut self, name: &'static str) -> Builder {
        self.signal_file = Some(name);
        self
    }

    /// It lives by this clock, and what it runs too.
    pub fn clock(mut self, clock: &Arc<ModelClock>) -> Builder {
        self.clock = Some(clock.clone());
        self
    }

    /// A variable for what it runs.
    pub fn environment(mut self, name: &str, value: &str) -> Builder {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Starts it and waits until it takes connections (a hot standby: read-only ones).
    pub fn start(self) -> Server {
        self.try_start().unwrap_or_else(|log| panic!("the server did not start:\n{log}"))
    }

    /// Like [`Builder::start`]; a server that ends instead gives its log.
    pub fn try_start(self) -> Result<Server, String> {
        let mut server = self.make();
        server.launch()?;
        server.wait_for_status(&["ready", "standby"], START_DEADLINE)?;
        Ok(server)
    }

    /// Starts it and waits for the end of its recovery: it is promoted, or it ends and gives its log.
    pub fn start_recovered(self) -> Result<Server, String> {
        let mut server = self.make();
        server.launch()?;
        server.await_recovered()?;
        Ok(server)
    }

    /// Starts the process without waiting for anything.
    pub fn launch(self) -> Server {
        let mut server = self.make();
        server.launch().unwrap_or_else(|log| panic!("the server did not start:\n{log}"));
        server
    }

    /// The directory, ready to be started.
    fn make(self) -> Server {
        let find = if self.has_tls { Installation::with_tls } else { Installation::of };
        let installation = find(self.major)
            .unwrap_or_else(|| panic!("PostgreSQL {} is not installed: run tests/servers/install", self.major));
        let has_fixed_port = self.port.is_some();
        let port = self.port.unwrap_or_else(free_port);
        let mut server =
            Server { installation, scratch: Scratch::new(), builder: self, port, has_fixed_port, postmaster: None };
        match &server.builder.origin {
            None => server.initdb(),
            Some(origin) => server.copy_from(origin),
        }
        server.builder.origin_backup = None;
        server.write_configuration();
        server
    }
}

pub fn free_port() -> u16 {
    process::claim_port(|port| TcpListener::bind(("127.0.0.1", port)).is_ok())
}

// --- A server --------------------------------------------------------------------------------------------------

/// How a server is asked to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Waits for sessions to end by themselves.
    Smart,
    /// Ends sessions, writes a shutdown checkpoint, waits for walsenders to have it acknowledged.
    Fast,
    /// As after a crash: no checkpoint.
    Immediate,
}

/// A cluster in a directory of its own; killed and removed when dropped, its log shown when the test fails.
#[derive(Debug)]
pub struct Server {
    postmaster: Option<Reaped>,
    installation: Installation,
    builder: Builder,
    port: u16,
    has_fixed_port: bool,
    scratch: Scratch,
}

impl Server {
    pub fn builder(major: u32) -> Builder {
        Builder {
            major,
            wal_segment_mib: 16,
            has_checksums: false,
            has_tls: false,
            port: None,
            settings: Vec::new(),
            hba: None,
            origin: None,
            origin_backup: None,
            signal_file: None,
            clock: None,
            environment: Vec::new(),
        }
    }

    /// A streaming standby of a running server, with its settings, from a fresh base backup of it.
    pub fn standby_of(primary: &Server) -> Builder {
        let backup = primary.base_backup();
        let conninfo = format!("{} application_name=standby", primary.conninfo());
        let mut builder = primary.builder.clone().setting("primary_conninfo", &conninfo);
        builder.port = None;
        builder.signal_file = Some("standby.signal");
        builder.origin = Some(backup.path());
        builder.origin_backup = Some(Arc::new(backup));
        builder
    }

    /// A server that recovers a copy of a data directory by a `restore_command`; see [`Builder::start_recovered`].
    pub fn copy_recovering(major: u32, data: &Path, restore_command: &str) -> Builder {
        Server::builder(major)
            .on_copy_of(data)
            .signal_file("recovery.signal")
            .setting("restore_command", restore_command)
    }

    fn initdb(&self) {
        let mut initdb = self.installation.command("initdb");
        initdb.args(["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]);
        initdb.arg(format!("--wal-segsize={}", self.builder.wal_segment_mib)).arg("-D").arg(self.data_dir());
        if self.builder.has_checksums {
            initdb.arg("--data-checksums");
        } else if self.major() >= 18 {
            initdb.arg("--no-data-checksums"); // on by default since 18
        }
        process::run_ok(&mut initdb, STATEMENT_DEADLINE);
    }

    fn copy_from(&self, origin: &Path) {
        process::run_ok(Command::new("cp").arg("-a").arg(origin).arg(self.data_dir()), RECOVERY_DEADLINE);
        process::give_to_service_user(&self.data_dir());
        let mode = fs::Permissions::from_mode(0o700);
        fs::set_permissions(self.data_dir(), mode).expect("our directory's mode can be set");
        let _ = fs::remove_file(self.data_dir().join("postmaster.pid"));
    }

    fn write_configuration(&self) {
        let mut conf = format!(
            "listen_addresses = '127.0.0.1'\nport = {}\nunix_socket_directories = '{}'\n\
             fsync = off\ndynamic_shared_memory_type = mmap\nshared_buffers = 16MB\nmax_connections = 40\nmax_wal_senders = 10\n\
             log_line_prefix = '%m [%p] %a '\nlog_replication_commands = on\nlog_timezone = 'UTC'\ntimezone = 'UTC'\n",
            self.port,
            self.socket_dir().display(),
        );
        for (name, value) in &self.builder.settings {
            conf.push_str(&format!("{name} = '{}'\n", value.replace('\'', "''")));
        }
        let others = "local all all trust\nlocal replication all trust\n\
                      host all all 127.0.0.1/32 trust\nhost replication all 127.0.0.1/32 trust\n";
        let others = self.builder.hba.as_deref().unwrap_or(others);
        let hba = format!("local all postgres trust\nlocal replication postgres trust\n{others}\n");
        self.write_data_file("postgresql.conf", &conf);
        self.write_data_file("pg_hba.conf", &hba);
        if let Some(name) = self.builder.signal_file {
            self.write_data_file(name, "");
        }
    }

    /// Writes a file of the data directory as the server's user would.
    pub fn write_data_file(&self, name: &str, content: &str) {
        let path = self.data_dir().join(name);
        fs::write(&path, content).expect("a test's file can be written");
        process::give_to_service_user(&path);
    }

    // --- Where it is ---

    pub fn major(&self) -> u32 {
        self.installation.major
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn socket_dir(&self) -> PathBuf {
        self.scratch.path().to_owned()
    }

    pub fn data_dir(&self) -> PathBuf {
        self.scratch.join("data")
    }

    pub fn wal_dir(&self) -> PathBuf {
        self.data_dir().join("pg_wal")
    }

    pub fn log_file(&self) -> PathBuf {
        self.scratch.join("log")
    }

    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.log_file()).unwrap_or_default()).into_owned()
    }

    /// By the socket, as the superuser.
    pub fn conninfo(&self) -> String {
        format!("host={} port={} user=postgres dbname=postgres", self.socket_dir().display(), self.port)
    }

    /// By TCP over loopback, as the superuser.
    pub fn tcp_conninfo(&self) -> String {
        format!("host=127.0.0.1 port={} user=postgres dbname=postgres", self.port)
    }

    // --- Its life ---

    /// Starts a stopped or crashed server again and waits until it takes connections.
    pub fn start(&mut self) {
        let outcome = self.launch().and_then(|()| self.wait_for_status(&["ready", "standby"], START_DEADLINE));
        outcome.unwrap_or_else(|log| panic!("the server did not start again:\n{log}"));
    }

    fn launch(&mut self) -> Result<(), String> {
        assert!(self.postmaster.is_none(), "it is running");
        let log = File::options().create(true).append(true).open(self.log_file()).expect("its log can be opened");
        let mut postgres = self.installation.command("postgres");
        postgres.arg("-D").arg(self.data_dir()).stdin(Stdio::null());
        postgres.stdout(log.try_clone().expect("a file handle can be cloned")).stderr(log);
        if let Some(clock) = &self.builder.clock {
            clock.show_to(&mut postgres);
        }
        postgres.envs(self.builder.environment.iter().map(|(name, value)| (name, value)));
        let child = postgres.spawn().map_err(|error| format!("could not run {postgres:?}: {error}"))?;
        self.postmaster = Some(Reaped(child));
        Ok(())
    }

    /// The last line of postmaster.pid is the state it has reached: starting, ready (for connections, a hot standby
    /// too), standby (a warm one, which takes none), stopping.
    fn status(&self) -> Option<String> {
        let pid = self.postmaster.as_ref()?.0.id().to_string();
        let text = fs::read_to_string(self.data_dir().join("postmaster.pid")).ok()?;
        let lines: Vec<_> = text.lines().collect();
        let is_ours = lines.first() == Some(&pid.as_str()); // not what a crashed one left
        lines.get(7).filter(|_| is_ours).map(|status| status.trim().to_owned())
    }

    fn wait_for_status(&mut self, wanted: &[&str], deadline: Duration) -> Result<(), String> {
        let what = format!("the server on port {} becomes {wanted:?}", self.port);
        loop {
            let outcome = process::eventually(deadline, &what, || {
                if self.has_stopped() {
                    return Some(Err(self.log()));
                }
                self.status().filter(|status| wanted.contains(&status.as_str())).map(|_| Ok(()))
            });
            match outcome {
                // Somebody took the port between our look and the server's start: elsewhere, then.
                Err(log) if !self.has_fixed_port && log.contains("could not create any TCP/IP sockets") => {
                    fs::remove_file(self.log_file()).expect("its log can be removed");
                    self.port = free_port();
                    self.write_configuration();
                    self.launch()?;
                }
                outcome => return outcome,
            }
        }
    }

    /// Waits for the end of a recovery that was launched.
    pub fn await_recovered(&mut self) -> Result<(), String> {
        self.wait_for_status(&["ready"], RECOVERY_DEADLINE)?;
        self.wait_recovered()
    }

    /// A hot standby is "ready" too, so the state in postmaster.pid does not tell the end of a recovery.
    fn wait_recovered(&mut self) -> Result<(), String> {
        process::eventually(RECOVERY_DEADLINE, "its recovery ends", || {
            if self.has_stopped() {
                return Some(Err(self.log()));
            }
            // An error is a server about to end, which the next look sees.
            let answer = self.try_sql("select pg_is_in_recovery()").ok()?;
            (answer == [["f"]]).then_some(Ok(()))
        })
    }

    /// Whether its process has ended (or was never started).
    pub fn has_stopped(&mut self) -> bool {
        let Some(postmaster) = &mut self.postmaster else { return true };
        let has_ended = postmaster.0.try_wait().expect("our child can be waited for").is_some();
        if has_ended {
            self.postmaster = None;
        }
        has_ended
    }

    /// Stops it and waits until it has.
    pub fn stop(&mut self, how: Stop) {
        self.begin_stop(how);
        self.wait_stopped(STOP_DEADLINE);
    }

    /// Asks it to stop and returns at once.
    pub fn begin_stop(&self, how: Stop) {
        let signal = match how {
            Stop::Smart => Signal::TERM,
            Stop::Fast => Signal::INT,
            Stop::Immediate => Signal::QUIT,
        };
        self.signal(signal);
    }

    /// A signal to the postmaster.
    pub fn signal(&self, signal: Signal) {
        self.postmaster.as_ref().expect("it is running").signal(signal);
    }

    pub fn wait_stopped(&mut self, deadline: Duration) {
        let what = format!("the server on port {} stops", self.port);
        process::eventually(deadline, &what, || self.has_stopped().then_some(()));
    }

    /// A crash: every process of it is gone at once.
    pub fn kill9(&mut self) {
        let Some(mut postmaster) = self.postmaster.take() else { return };
        postmaster.signal(Signal::STOP); // no new children while we look at them
        let mut processes = process::children_of(postmaster.0.id());
        processes
            .extend(processes.clone().iter().flat_map(|pid| process::children_of(pid.as_raw_nonzero().get() as u32)));
        postmaster.signal(Signal::KILL);
        for pid in &processes {
            let _ = rustix::process::kill_process(*pid, Signal::KILL); // it may have ended
        }
        let _ = postmaster.0.wait();
        let what = "the server's processes end";
        let are_gone = || processes.iter().all(|pid| !process::is_alive(*pid));
        process::eventually(STOP_DEADLINE, what, || are_gone().then_some(()));
    }

    /// Whatever it is doing, it is gone afterwards, with all it holds outside its directory.
    fn end(&mut self) {
        const PATIENCE: Duration = Duration::from_secs(5);
        if let Some(postmaster) = &self.postmaster {
            postmaster.signal(Signal::CONT); // a test may have stopped it
            postmaster.signal(Signal::QUIT);
        }
        let begun = Instant::now();
        while !self.has_stopped() && begun.elapsed() < PATIENCE {
            thread::sleep(Duration::from_millis(10));
        }
        self.kill9();
        // A crashed one leaves a System V segment, named by key and id in the seventh line of its postmaster.pid.
        let left = fs::read_to_string(self.data_dir().join("postmaster.pid")).unwrap_or_default();
        if let Some(id) = left.lines().nth(6).and_then(|line| line.split_whitespace().nth(1)) {
            let _ = Command::new("ipcrm").args(["-m", id]).stderr(Stdio::null()).status();
        }
    }

    pub fn restart(&mut self) {
        self.stop(Stop::Fast);
        self.start();
    }

    /// Adds a setting for this and all later starts; [`Server::reload`] or [`Server::restart`] makes it hold.
    pub fn set(&mut self, name: &str, value: &str) {
        self.builder.settings.push((name.to_owned(), value.to_owned()));
        self.builder.signal_file = None; // it has served, or the server has removed it
        self.write_configuration();
    }

    pub fn reload(&self) {
        self.sql("select pg_reload_conf()");
    }

    /// Ends a standby's recovery and waits until it takes writes, on a new timeline.
    pub fn promote(&mut self) {
        self.sql("select pg_promote(true, 300)");
        self.wait_recovered().unwrap_or_else(|log| panic!("it ended instead:\n{log}"));
    }

    // --- Talking to it ---

    /// The rows of one statement as `psql` prints their values; null is empty.
    pub fn sql(&self, statement: &str) -> Vec<Vec<String>> {
        self.try_sql(statement).unwrap_or_else(|error| panic!("{statement}\nfailed: {error}"))
    }

    /// Like [`Server::sql`]; what the server or psql said when it failed.
    pub fn try_sql(&self, statement: &str) -> Result<Vec<Vec<String>>, String> {
        let mut psql = Installation::newest_with("psql").command("psql");
        psql.args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-F", FIELD_SEPARATOR, "-R", RECORD_SEPARATOR]);
        psql.args(["-d", &self.conninfo(), "-c", statement]);
        let output = process::run(&mut psql, STATEMENT_DEADLINE);
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        let text = String::from_utf8(output.stdout).expect("the database is UTF-8");
        let text = text.strip_suffix('\n').unwrap_or(&text);
        let row = |record: &str| record.split(FIELD_SEPARATOR).map(str::to_owned).collect();
        Ok(if text.is_empty() { Vec::new() } else { text.split(RECORD_SEPARATOR).map(row).collect() })
    }

    /// The one value of a statement with one row of one column.
    pub fn value(&self, statement: &str) -> String {
        let mut rows = self.sql(statement);
        assert!(rows.len() == 1 && rows[0].len() == 1, "{statement}: {rows:?} is not one value");
        rows.remove(0).remove(0)
    }

    fn lsn(&self, statement: &str) -> Lsn {
        self.value(statement).parse().expect("the server prints an LSN")
    }

    /// What is on its disk; on a standby, what it has received.
    pub fn flush_lsn(&self) -> Lsn {
        self.lsn(
            "select case when pg_is_in_recovery() then coalesce(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()) \
             else pg_current_wal_flush_lsn() end",
        )
    }

    /// Ends the current segment; the end of its last record.
    pub fn switch_wal(&self) -> Lsn {
        self.lsn("select pg_switch_wal()")
    }

    /// The name of the segment written to now.
    pub fn current_segment(&self) -> String {
        self.value("select pg_walfile_name(pg_current_wal_flush_lsn())")
    }

    /// A physical slot that holds WAL from now on.
    pub fn create_slot(&self, name: &str) {
        self.sql(&format!("select pg_create_physical_replication_slot('{name}', true)"));
    }

    /// The timeline it writes, of a server that takes writes.
    pub fn timeline(&self) -> u32 {
        u32::from_str_radix(&self.current_segment()[..8], 16).expect("a segment name starts with its timeline")
    }

    pub fn system_id(&self) -> String {
        self.value("select system_identifier::text from pg_control_system()")
    }

    /// Waits until a standby has replayed up to a position.
    pub fn wait_replayed(&self, lsn: Lsn) {
        let statement = format!("select coalesce(pg_last_wal_replay_lsn() >= '{lsn}', false)");
        process::eventually(RECOVERY_DEADLINE, &format!("it replays {lsn}"), || {
            (self.value(&statement) == "t").then_some(())
        });
    }

    // --- Load ---

    /// About 12 MiB of tables per unit of scale, and more WAL.
    pub fn pgbench_init(&self, scale: u32) {
        self.pgbench(&["-i", "-q", "-s", &scale.to_string()]);
    }

    /// Transactions of pgbench's own kind, by two clients, until all are done.
    pub fn pgbench_transactions(&self, count_per_client: u32) {
        self.pgbench(&["-n", "-c", "2", "-t", &count_per_client.to_string()]);
    }

    /// Any other run of pgbench.
    pub fn pgbench(&self, arguments: &[&str]) {
        process::run_ok(&mut self.pgbench_command(arguments), STATEMENT_DEADLINE);
    }

    /// Load that goes on for `seconds` while the test does something else; ends when dropped.
    pub fn pgbench_background(&self, clients: u32, seconds: u32) -> BackgroundLoad {
        self.background(&["-c", &clients.to_string(), "-T", &seconds.to_string()])
    }

    /// The same with so many transactions a second, by one client.
    pub fn pgbench_background_at(&self, per_second: u32, seconds: u32) -> BackgroundLoad {
        self.background(&["-R", &per_second.to_string(), "-T", &seconds.to_string()])
    }

    fn background(&self, arguments: &[&str]) -> BackgroundLoad {
        let mut pgbench = self.pgbench_command(&[&["-n"], arguments].concat());
        let child = pgbench.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        BackgroundLoad { pgbench: Reaped(child.expect("pgbench starts")) }
    }

    /// Waits until the last transactions of a load that was ended have ended too.
    pub fn wait_no_load(&self) {
        let left = "select count(*) from pg_stat_activity where application_name = 'pgbench'";
        let what = "pgbench's sessions end";
        process::eventually(STATEMENT_DEADLINE, what, || (self.value(left) == "0").then_some(()));
    }

    fn pgbench_command(&self, arguments: &[&str]) -> Command {
        let mut pgbench = Installation::newest_with("pgbench").command("pgbench");
        pgbench.args(arguments).arg(self.conninfo()); // a database name that holds a '=' is a conninfo
        pgbench
    }

    // --- Backups ---

    /// A plain base backup by `pg_basebackup`, with the WAL to make it consistent.
    pub fn base_backup(&self) -> BaseBackup {
        self.base_backup_with(&["-X", "stream"])
    }

    /// The same without WAL: a recovery must get it from the archive.
    pub fn base_backup_without_wal(&self) -> BaseBackup {
        self.base_backup_with(&["-X", "none"])
    }

    fn base_backup_with(&self, arguments: &[&str]) -> BaseBackup {
        let backup = BaseBackup { major: self.major(), scratch: Scratch::new() };
        let mut command = Installation::newest_with("pg_basebackup").command("pg_basebackup");
        command.args(["-c", "fast", "--no-sync", "-d", &self.conninfo()]).args(arguments).arg("-D").arg(backup.path());
        process::run_ok(&mut command, RECOVERY_DEADLINE);
        backup
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if std::thread::panicking() {
            process::print_log_end(&format!("PostgreSQL {} on port {}", self.major(), self.port), &self.log_file());
        }
        self.end();
    }
}

/// A data directory as `pg_basebackup` left it; removed when dropped.
#[derive(Debug)]
pub struct BaseBackup {
    major: u32,
    scratch: Scratch,
}

impl BaseBackup {
    pub fn path(&self) -> PathBuf {
        self.scratch.join("backup")
    }

    /// A server that recovers a copy of it; see [`Builder::start_recovered`].
    pub fn recover(&self, restore_command: &str) -> Builder {
        Server::copy_recovering(self.major, &self.path(), restore_command)
    }
}

/// pgbench at work; [`BackgroundLoad::wait`] for its end, or drop it to end it.
#[derive(Debug)]
pub struct BackgroundLoad {
    pgbench: Reaped,
}

impl BackgroundLoad {
    /// Waits for its end; fails when a client of it failed.
    pub fn wait(mut self, deadline: Duration) {
        let child = &mut self.pgbench.0;
        let status =
            process::eventually(deadline, "pgbench ends", || child.try_wait().expect("our child can be waited for"));
        assert!(status.success(), "pgbench failed with {status}");
    }
}
