//! Owns: the demonstration's directory and processes: started as the service user, waited for with deadlines, and
//! gone when it is over, however it ends.
//! Does not own: what happens in it (`mod.rs`).

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use tokio::signal::unix::{SignalKind, signal};

use super::installation::{Installation, ServiceUser, without_settings};
use crate::cli::setup;
use crate::error::{ExitCode, Failure};

/// Between two looks at something that is awaited.
const LOOK_INTERVAL: Duration = Duration::from_millis(30);
/// For one tool on a busy machine.
const TOOL_DEADLINE: Duration = Duration::from_secs(300);
const STOP_DEADLINE: Duration = Duration::from_secs(60);
/// A socket's name holds 107 bytes.
const BASE_BYTES_MAX: usize = 60;

/// Ctrl-C, SIGTERM or SIGHUP: noticed at the next look, so that everything is put away first.
#[derive(Clone, Debug, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    pub fn listen() -> Interrupt {
        let interrupt = Interrupt::default();
        let noticed = interrupt.clone();
        thread::spawn(move || {
            setup::block_on(async {
                let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
                let listening: Result<Vec<_>, _> = kinds.into_iter().map(signal).collect();
                let Ok(mut listening) = listening else { return };
                let [interrupt, terminate, hangup] = &mut listening[..] else { return };
                loop {
                    tokio::select! {
                        _ = interrupt.recv() => {}
                        _ = terminate.recv() => {}
                        _ = hangup.recv() => {}
                    }
                    noticed.0.store(true, Ordering::Relaxed);
                }
            })
        });
        interrupt
    }

    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    fn check(&self) -> Result<(), Failure> {
        if self.is_set() { Err(Failure::new(ExitCode::TryAgain, "interrupted")) } else { Ok(()) }
    }
}

/// What stays when the scene is cleared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    Nothing,
    /// After a failure: why it failed is in them.
    Logs,
}

/// A server's data directory and the socket directory it listens in.
#[derive(Clone, Debug)]
pub struct Server {
    pub data: PathBuf,
    pub socket: PathBuf,
    log: PathBuf,
}

impl Server {
    pub const USER: &str = "postgres";

    pub fn conninfo(&self) -> String {
        format!("host={} user={} dbname=postgres", self.socket.display(), Server::USER)
    }
}

/// The directory with everything in it, and the processes that run there.
#[derive(Debug)]
pub struct Scene {
    pub directory: PathBuf,
    pub installation: Installation,
    pub interrupt: Interrupt,
    user: ServiceUser,
    program: PathBuf,
    agent: Option<Child>,
    load: Option<Child>,
    running: Vec<Server>,
}

impl Scene {
    pub fn new(installation: Installation, user: ServiceUser, interrupt: Interrupt) -> Result<Scene, Failure> {
        let made = tempfile::Builder::new().prefix("seawall-demo-").tempdir_in(base());
        let directory = made.map_err(|error| at(&base(), "make a directory in", &error))?.keep();
        let program = std::env::current_exe().map_err(|error| failed("finding this program", &error.to_string()))?;
        let mut scene =
            Scene { program, directory, installation, interrupt, user, agent: None, load: None, running: Vec::new() };
        // Closed to everybody else: the server inside trusts whoever reaches its socket.
        scene.give(&scene.directory)?;
        for name in ["logs", "server-socket", "before-socket", "copy-socket"] {
            let path = scene.path(name);
            DirBuilder::new().mode(0o700).create(&path).map_err(|error| at(&path, "make", &error))?;
            scene.give(&path)?;
        }
        if let ServiceUser::Other { .. } = user {
            // The build's directory may be closed to that user.
            let copy = scene.path("seawall");
            fs::copy(&scene.program, &copy).map_err(|error| at(&copy, "copy this program to", &error))?;
            fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))
                .map_err(|error| at(&copy, "make executable", &error))?;
            scene.program = copy;
        }
        Ok(scene)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    pub fn server(&self, name: &str, data: &str) -> Server {
        let socket = self.path(&format!("{name}-socket"));
        Server { data: self.path(data), socket, log: self.log(name) }
    }

    fn log(&self, name: &str) -> PathBuf {
        self.path(&format!("logs/{name}.log"))
    }

    fn give(&self, path: &Path) -> Result<(), Failure> {
        let ServiceUser::Other { uid, gid } = self.user else { return Ok(()) };
        chown(path, Some(uid), Some(gid)).map_err(|error| at(path, "give away", &error))
    }

    /// Writes a file of the service user's, after what it holds.
    pub fn append(&self, path: &Path, text: &str) -> Result<(), Failure> {
        let opened = OpenOptions::new().create(true).append(true).mode(0o600).open(path);
        let written = opened.and_then(|mut file| std::io::Write::write_all(&mut file, text.as_bytes()));
        written.map_err(|error| at(path, "write", &error))?;
        self.give(path)
    }

    // --- Commands ---

    pub fn tool(&self, name: &str) -> Command {
        self.as_service_user(self.installation.command(name))
    }

    /// `seawall --config … ARGUMENTS`
    pub fn seawall(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        without_settings(&mut command).arg("--config").arg(self.configuration()).args(arguments);
        self.as_service_user(command)
    }

    pub fn configuration(&self) -> PathBuf {
        self.path("seawall.toml")
    }

    fn as_service_user(&self, mut command: Command) -> Command {
        self.user.become_in(&mut command);
        // Ctrl-C on the terminal is for us alone: we end them in order.
        command.current_dir(&self.directory).env("HOME", &self.directory).stdin(Stdio::null()).process_group(0);
        command
    }

    fn log_file(&self, name: &str) -> Result<File, Failure> {
        let path = self.log(name);
        let opened = OpenOptions::new().create(true).append(true).mode(0o600).open(&path);
        let file = opened.map_err(|error| at(&path, "write", &error))?;
        self.give(&path)?;
        Ok(file)
    }

    /// Runs a tool to its end: its exit code and standard output.
    pub fn answer(&self, what: &str, mut command: Command) -> Result<(i32, String), Failure> {
        let stderr = self.log_file("tools")?;
        let spawned = command.stdout(Stdio::piped()).stderr(stderr).spawn();
        let mut child = Started(spawned.map_err(|error| failed(what, &error.to_string()))?);
        let deadline = Instant::now() + TOOL_DEADLINE;
        let status = loop {
            match child.0.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if Instant::now() < deadline => {}
                Ok(None) => return Err(failed(what, &format!("not done within {TOOL_DEADLINE:?}"))),
                Err(error) => return Err(failed(what, &error.to_string())),
            }
            self.interrupt.check()?;
            thread::sleep(LOOK_INTERVAL);
        };
        let mut stdout = String::new();
        if let Some(mut pipe) = child.0.stdout.take() {
            pipe.read_to_string(&mut stdout).map_err(|error| failed(what, &error.to_string()))?;
        }
        Ok((status.code().unwrap_or(-1), stdout.trim_end().to_string()))
    }

    /// Runs a tool that must succeed.
    pub fn run(&self, what: &str, command: Command) -> Result<String, Failure> {
        match self.answer(what, command)? {
            (0, stdout) => Ok(stdout),
            (code, _) => Err(failed(what, &format!("exit code {code}: {}", last_words(&self.log("tools"))))),
        }
    }

    pub fn sql(&self, server: &Server, query: &str) -> Result<String, Failure> {
        let mut psql = self.tool("psql");
        psql.args(["-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1", "-d", &server.conninfo(), "-c", query]);
        self.run("psql", psql)
    }

    /// Asks until there is an answer.
    pub fn wait<T>(
        &mut self,
        what: &str,
        deadline: Duration,
        mut ask: impl FnMut(&mut Scene) -> Result<Option<T>, Failure>,
    ) -> Result<T, Failure> {
        let started = Instant::now();
        loop {
            self.interrupt.check()?;
            if let Some(answer) = ask(self)? {
                return Ok(answer);
            }
            if started.elapsed() > deadline {
                return Err(failed(what, &format!("not within {deadline:?}")));
            }
            thread::sleep(LOOK_INTERVAL);
        }
    }

    pub fn pause(&mut self, duration: Duration) -> Result<(), Failure> {
        let until = Instant::now() + duration;
        self.wait("a pause", duration * 2, |_| Ok((Instant::now() >= until).then_some(())))
    }

    // --- Servers ---

    pub fn start_server(&mut self, server: &Server) -> Result<(), Failure> {
        let mut start = self.tool("pg_ctl");
        start.args(["start", "-w", "-s", "-t", "300", "-l"]).arg(&server.log).arg("-D").arg(&server.data);
        self.running.push(server.clone());
        let started = self.run("pg_ctl start", start);
        started.map(drop).map_err(|failure| failure.context(last_words(&server.log)))
    }

    /// As a power cut ends it: no checkpoint, no last words.
    pub fn crash_server(&mut self, server: &Server) -> Result<(), Failure> {
        let mut stop = self.tool("pg_ctl");
        stop.args(["stop", "-w", "-s", "-m", "immediate", "-t", "10", "-D"]).arg(&server.data);
        self.run("pg_ctl stop", stop)?;
        self.running.retain(|other| other.data != server.data);
        Ok(())
    }

    pub fn remove(&self, path: &Path) -> Result<(), Failure> {
        fs::remove_dir_all(path).map_err(|error| at(path, "remove", &error))
    }

    // --- Agent and load ---

    pub fn start_agent(&mut self) -> Result<u32, Failure> {
        let log = self.log_file("agent")?;
        let spawned = self.seawall(&["run"]).stdout(Stdio::null()).stderr(log).spawn();
        let child = spawned.map_err(|error| failed("seawall run", &error.to_string()))?;
        let pid = child.id();
        self.agent = Some(child);
        Ok(pid)
    }

    /// Fails when the agent has ended by itself.
    pub fn check_agent(&mut self) -> Result<(), Failure> {
        let Some(agent) = &mut self.agent else { return Ok(()) };
        match agent.try_wait() {
            Ok(None) => Ok(()),
            _ => Err(failed("seawall run", &format!("it has ended: {}", last_words(&self.log("agent"))))),
        }
    }

    /// SIGKILL: no destructor, no farewell.
    pub fn kill_agent(&mut self) {
        end(self.agent.take());
    }

    /// SIGTERM, as a service manager would.
    pub fn stop_agent(&mut self) -> Result<(), Failure> {
        let Some(agent) = &self.agent else { return Ok(()) };
        let _ = rustix::process::kill_process(Pid::from_child(agent), Signal::TERM);
        let ended = |scene: &mut Scene| {
            let agent = scene.agent.as_mut();
            Ok(agent.is_none_or(|agent| !matches!(agent.try_wait(), Ok(None))).then_some(()))
        };
        self.wait("seawall run ends", STOP_DEADLINE, ended)?;
        self.agent = None;
        Ok(())
    }

    pub fn start_load(&mut self, mut command: Command) -> Result<(), Failure> {
        let log = self.log_file("pgbench")?;
        let again = log.try_clone().map_err(|error| failed("pgbench", &error.to_string()))?;
        let spawned = command.stdout(log).stderr(again).spawn();
        self.load = Some(spawned.map_err(|error| failed("pgbench", &error.to_string()))?);
        Ok(())
    }

    /// True once the load has ended well.
    pub fn is_load_over(&mut self) -> Result<bool, Failure> {
        let Some(load) = &mut self.load else { return Ok(true) };
        match load.try_wait() {
            Ok(None) => Ok(false),
            Ok(Some(status)) if status.success() => Ok(true),
            _ => Err(failed("pgbench", &last_words(&self.log("pgbench")))),
        }
    }

    // --- The end ---

    /// Ends agent and load; leaves servers and files to who wants to look at them.
    pub fn leave(mut self) {
        end(self.load.take());
        end(self.agent.take());
        self.running.clear();
        self.directory = PathBuf::new();
    }

    /// Ends everything and removes the directory.
    pub fn clear(&mut self, keep: Keep) {
        end(self.load.take());
        end(self.agent.take());
        for server in std::mem::take(&mut self.running) {
            self.end_server(&server);
        }
        if self.directory.as_os_str().is_empty() {
            return;
        }
        if keep == Keep::Logs {
            for entry in fs::read_dir(&self.directory).into_iter().flatten().flatten() {
                let path = entry.path();
                let _ = match path.is_dir() {
                    true if path.ends_with("logs") => Ok(()),
                    true => fs::remove_dir_all(path),
                    false => fs::remove_file(path),
                };
            }
        } else {
            let _ = fs::remove_dir_all(&self.directory);
        }
        self.directory = PathBuf::new();
    }

    /// By the process id it wrote down: its tools may be what failed. SIGQUIT is an immediate shutdown.
    fn end_server(&self, server: &Server) {
        let lock = server.data.join("postmaster.pid");
        let first_line = || fs::read_to_string(&lock).ok()?.lines().next()?.parse().ok();
        let Some(pid) = first_line().and_then(Pid::from_raw) else { return };
        let _ = rustix::process::kill_process(pid, Signal::QUIT);
        let deadline = Instant::now() + STOP_DEADLINE;
        // It removes its file last; its process may stay as a zombie where nobody reaps.
        while lock.exists() && rustix::process::test_kill_process(pid).is_ok() && Instant::now() < deadline {
            thread::sleep(LOOK_INTERVAL);
        }
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        self.clear(Keep::Nothing);
    }
}

/// A tool that does not outlive whoever waits for it.
struct Started(Child);

impl Drop for Started {
    fn drop(&mut self) {
        if let Ok(None) = self.0.try_wait() {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

fn end(child: Option<Child>) {
    drop(child.map(Started));
}

/// `TMPDIR`, unless a socket's name does not fit below it, or its name would need quoting in a connection string.
fn base() -> PathBuf {
    let temporary = std::env::temp_dir();
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"/._-".contains(byte);
    let name = temporary.as_os_str().as_encoded_bytes();
    let is_open = |path: &Path| fs::metadata(path).is_ok_and(|found| found.permissions().mode() & 0o1 != 0);
    let fits = temporary.is_absolute() && name.len() <= BASE_BYTES_MAX && name.iter().all(plain);
    if fits && temporary.ancestors().all(is_open) { temporary } else { PathBuf::from("/tmp") }
}

fn at(path: &Path, verb: &str, error: &std::io::Error) -> Failure {
    Failure::new(ExitCode::Permission, format!("could not {verb} {}: {error}", path.display()))
        .hint("is there room, and may this user write there? TMPDIR names another place")
}

fn failed(what: &str, why: &str) -> Failure {
    Failure::new(ExitCode::Unavailable, format!("{what}: {why}"))
}

/// The end of a log, on one line.
fn last_words(log: &Path) -> String {
    const LINES: usize = 3;
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(LINES)..].join(" | ")
}
