//! Owns: the built `seawall` as users run it: arguments, signals, what it printed, where it stands.
//! Does not own: servers (`postgres.rs`).

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::time::Duration;

pub use rustix::process::Signal;

use super::process::{self, Reaped, Scratch};

/// For a command that should answer at once.
const ANSWER_DEADLINE: Duration = process::DEADLINE;

/// The binary under test.
pub fn binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_seawall"))
}

/// A command that runs the binary, free of the settings of whoever runs the tests.
pub fn command<A: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = A>) -> Command {
    let mut command = Command::new(binary());
    clean_environment(&mut command).args(arguments);
    command
}

/// Runs `seawall ARGUMENTS` to its end.
pub fn seawall<A: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = A>) -> Output {
    process::run(&mut command(arguments), ANSWER_DEADLINE)
}

/// Runs `seawall ARGUMENTS`, which must succeed; its standard output.
pub fn seawall_ok<A: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = A>) -> String {
    process::run_ok(&mut command(arguments), ANSWER_DEADLINE)
}

pub fn clean_environment(command: &mut Command) -> &mut Command {
    for (name, _) in std::env::vars_os() {
        let name_text = name.to_string_lossy();
        if name_text.starts_with("PG") || name_text.starts_with("SEAWALL") || name_text == "RUST_LOG" {
            command.env_remove(&name);
        }
    }
    command.env_remove("NOTIFY_SOCKET")
}

/// The binary where the service user can run it, for a server's `restore_command`: target/ may be closed to it.
pub fn binary_for_servers(scratch: &Scratch) -> PathBuf {
    let copy = scratch.join("seawall");
    if !copy.exists() {
        // By a child: a handle of our own, open for writing, would go to whatever another test starts meanwhile,
        // and the copy could not be run ("text file busy") until that ends.
        process::run_ok(Command::new("cp").arg(binary()).arg(&copy), ANSWER_DEADLINE);
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).expect("our copy's mode can be set");
    }
    copy
}

/// [`command`] as the service user runs it.
pub fn command_as_service_user<A: AsRef<std::ffi::OsStr>>(
    scratch: &Scratch,
    arguments: impl IntoIterator<Item = A>,
) -> Command {
    let mut command = Command::new(binary_for_servers(scratch));
    process::as_service_user(clean_environment(&mut command).args(arguments));
    command
}

/// `seawall ARGUMENTS` (`wal-get …` with `%f` and `%p`) as a `restore_command` a server can run.
///
/// `repository` becomes the service user's; whoever writes to it later as root calls
/// [`process::give_to_service_user`] again.
pub fn restore_command(scratch: &Scratch, repository: &Path, arguments: &[&str]) -> String {
    process::give_to_service_user(repository);
    let quoted = |word: &&str| if *word == "%f" { word.to_string() } else { format!("\"{word}\"") };
    let words: Vec<_> = arguments.iter().map(quoted).collect();
    format!("\"{}\" {}", binary_for_servers(scratch).display(), words.join(" "))
}

/// A running `seawall`, its output in files, killed when dropped; a failing test shows the end of its log.
#[derive(Debug)]
pub struct Agent {
    process: Reaped,
    output: Scratch,
}

impl Agent {
    /// Starts `seawall ARGUMENTS`, as the user running the tests.
    pub fn start<A: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = A>) -> Agent {
        Agent::spawn(command(arguments))
    }

    /// Starts it as the service user, as on a database host.
    pub fn start_as_service_user<A: AsRef<std::ffi::OsStr>>(
        scratch: &Scratch,
        arguments: impl IntoIterator<Item = A>,
    ) -> Agent {
        Agent::spawn(command_as_service_user(scratch, arguments))
    }

    /// Starts a command prepared by [`command`], with more environment for instance.
    pub fn spawn(mut command: Command) -> Agent {
        let output = Scratch::new();
        let file = |name: &str| File::create(output.join(name)).expect("a log file can be made");
        command.stdin(Stdio::null()).stdout(file("stdout")).stderr(file("stderr"));
        let child = command.spawn().unwrap_or_else(|error| panic!("could not start {command:?}: {error}"));
        Agent { process: Reaped(child), output }
    }

    pub fn pid(&self) -> u32 {
        self.process.0.id()
    }

    pub fn stdout(&self) -> String {
        self.read("stdout")
    }

    pub fn stderr(&self) -> String {
        self.read("stderr")
    }

    fn read(&self, name: &str) -> String {
        String::from_utf8_lossy(&fs::read(self.output.join(name)).expect("our log file is there")).into_owned()
    }

    /// `Signal::TERM`, `INT`, `HUP`, `STOP`, `CONT`.
    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    pub fn is_running(&mut self) -> bool {
        self.process.0.try_wait().expect("our child can be waited for").is_none()
    }

    /// Waits for it to end by itself.
    pub fn wait(&mut self, deadline: Duration) -> ExitStatus {
        let what = "the agent ends";
        process::eventually(deadline, what, || self.process.0.try_wait().expect("our child can be waited for"))
    }

    /// Asks it to stop and waits until it has.
    pub fn terminate(&mut self, deadline: Duration) -> ExitStatus {
        self.signal(Signal::TERM);
        self.wait(deadline)
    }

    /// A crash: no destructor, no farewell.
    pub fn kill9(&mut self) {
        self.signal(Signal::KILL);
        self.wait(ANSWER_DEADLINE);
    }

    /// Waits until its log holds `text`; fails when it ends before.
    pub fn wait_for_log(&mut self, text: &str, deadline: Duration) {
        process::eventually(deadline, &format!("the agent logs {text:?}"), || {
            let is_running = self.is_running(); // looked at first: the last lines come before the end
            let is_there = self.stderr().contains(text);
            assert!(is_there || is_running, "the agent ended without logging {text:?}");
            is_there.then_some(())
        });
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if std::thread::panicking() {
            process::print_log_end("seawall", &self.output.join("stderr"));
        }
    }
}
