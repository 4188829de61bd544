//! Owns: child processes with deadlines, the user servers run as, scratch directories that user can enter.
//! Does not own: what the processes are (`postgres.rs`, `agent.rs`).

use std::collections::BTreeSet;
use std::fs;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{PermissionsExt, chown, lchown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

/// Between two looks at a condition: far below anything a test waits for, far above the cost of looking.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// For whatever is awaited: it ends a test that would wait for ever, and is never part of what a test expects. A correct
/// run comes nowhere near it, however slow the machine is and whatever else it does.
pub const DEADLINE: Duration = Duration::from_secs(300);

/// Asks until there is an answer; panics with `what` after `deadline`.
pub fn eventually<T>(deadline: Duration, what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(started.elapsed() < deadline, "{what}: not within {deadline:?}");
        thread::sleep(POLL_INTERVAL);
    }
}

/// Runs a command to its end and collects what it printed; past the deadline it is killed and the test fails.
pub fn run(command: &mut Command, deadline: Duration) -> Output {
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = Reaped(child.unwrap_or_else(|error| panic!("could not run {command:?}: {error}")));
    let stdout = collect(child.0.stdout.take().expect("stdout is piped"));
    let stderr = collect(child.0.stderr.take().expect("stderr is piped"));
    let status =
        eventually(deadline, &format!("{command:?}"), || child.0.try_wait().expect("our child can be waited for"));
    let read = |thread: thread::JoinHandle<Vec<u8>>| thread.join().expect("reading a pipe does not panic");
    Output { status, stdout: read(stdout), stderr: read(stderr) }
}

/// Like [`run`], for a command that must succeed; its standard output.
pub fn run_ok(command: &mut Command, deadline: Duration) -> String {
    let output = run(command, deadline);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?} failed with {}:\n{stderr}", output.status);
    String::from_utf8(output.stdout).expect("text on stdout")
}

fn collect(mut pipe: impl Read + Send + 'static) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        bytes
    })
}

/// A child that is killed and reaped when its owner goes.
#[derive(Debug)]
pub struct Reaped(pub Child);

impl Reaped {
    pub fn signal(&self, signal: Signal) {
        // ESRCH: it ended by itself, which the caller finds out by waiting.
        let _ = rustix::process::kill_process(Pid::from_child(&self.0), signal);
    }
}

impl Drop for Reaped {
    fn drop(&mut self) {
        if let Ok(None) = self.0.try_wait() {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

/// Below the range the system takes for outgoing connections, so that none of those gets a server's port in between.
const PORTS: std::ops::Range<u16> = 15_000..32_000;

/// A port that `is_free` and that nobody here was given before: a server that is down for a while, or has yet to be
/// started, finds its own as it left it.
pub fn claim_port(is_free: impl Fn(u16) -> bool) -> u16 {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    let candidates = std::iter::repeat_with(|| fastrand::u16(PORTS)).take(10_000);
    let mut given = GIVEN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let mut candidates = candidates.filter(|&port| !given.contains(&port) && is_free(port));
    let port = candidates.next().expect("one of ten thousand ports is free");
    drop(candidates);
    given.insert(port);
    port
}

/// The living children of a process.
pub fn children_of(parent: u32) -> Vec<Pid> {
    let processes = fs::read_dir("/proc").expect("/proc can be listed");
    let pids = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter(|pid| parent_of(*pid) == Some(parent)).filter_map(|pid| Pid::from_raw(pid as i32)).collect()
}

pub fn is_alive(pid: Pid) -> bool {
    parent_of(pid.as_raw_nonzero().get() as u32).is_some()
}

/// The parent of a process, unless it has ended (a zombie has).
fn parent_of(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace(); // the name before it may hold anything
    let state = fields.next()?;
    let parent = fields.next()?.parse().ok()?;
    (!matches!(state, "Z" | "X")).then_some(parent)
}

/// Who PostgreSQL runs as: it refuses to be root, so root's tests hand it to the user `tests/servers/install` found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServiceUser {
    Ourselves,
    Other { uid: u32, gid: u32 },
}

pub fn service_user() -> ServiceUser {
    static USER: OnceLock<ServiceUser> = OnceLock::new();
    *USER.get_or_init(|| {
        if !rustix::process::getuid().is_root() {
            return ServiceUser::Ourselves;
        }
        let passwd = fs::read_to_string("/etc/passwd").expect("/etc/passwd is readable");
        let find = |name: &str| {
            let mut fields = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>());
            let entry = fields.find(|fields| fields.len() > 3 && fields[0] == name)?;
            Some(ServiceUser::Other { uid: entry[2].parse().ok()?, gid: entry[3].parse().ok()? })
        };
        find("postgres").or_else(|| find("seawall-test")).expect("tests/servers/install made a user for the servers")
    })
}

/// Makes a command run as the service user, from a directory it can be in.
pub fn as_service_user(command: &mut Command) -> &mut Command {
    command.current_dir("/");
    if let ServiceUser::Other { uid, gid } = service_user() {
        command.uid(uid).gid(gid);
    }
    command
}

/// Gives a file or a whole directory tree to the service user.
pub fn give_to_service_user(path: &Path) {
    let ServiceUser::Other { uid, gid } = service_user() else { return };
    if path.is_dir() && !path.is_symlink() {
        for entry in fs::read_dir(path).into_iter().flatten().flatten() {
            give_to_service_user(&entry.path());
        }
    }
    match lchown(path, Some(uid), Some(gid)) {
        // An agent at work has replaced it.
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        given => given.expect("root may give files away"),
    }
}

/// A directory of one test's own that the service user can enter and write; removed at the end.
///
/// `SEAWALL_KEEP=1` keeps it and says where it is.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
}

impl Scratch {
    pub fn new() -> Scratch {
        let directory =
            tempfile::Builder::new().prefix("sw").tempdir_in(base()).expect("a scratch directory can be made");
        let path = directory.keep();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("our directory's mode can be set");
        if let ServiceUser::Other { uid, gid } = service_user() {
            chown(&path, Some(uid), Some(gid)).expect("root may give directories away");
        }
        Scratch { path }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

/// `TMPDIR` only when a socket's name, at most 107 bytes, fits below it and others can enter it.
fn base() -> PathBuf {
    let temporary = std::env::temp_dir();
    let is_open = |path: &Path| fs::metadata(path).is_ok_and(|found| found.permissions().mode() & 0o1 != 0);
    if temporary.as_os_str().len() < 60 && temporary.ancestors().all(is_open) {
        temporary
    } else {
        PathBuf::from("/tmp")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if std::env::var_os("SEAWALL_KEEP").is_some() {
            eprintln!("kept: {}", self.path.display());
        } else {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// The end of a log, for a failing test.
pub fn print_log_end(what: &str, log: &Path) {
    const LINES: usize = 80;
    let bytes = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let skip = text.lines().count().saturating_sub(LINES);
    eprintln!("--- {what} ({}), last {LINES} lines ---", log.display());
    text.lines().skip(skip).for_each(|line| eprintln!("{line}"));
    eprintln!("--- end of {what} ---");
}
