//! `seawall demo`, as somebody who has just built it runs it: it tells its whole story, and leaves nothing behind.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::support::agent::{self, Agent, Signal};
use crate::support::process;

/// It takes less than a minute on an idle machine.
const DEADLINE: Duration = Duration::from_secs(600);

/// Finds servers where the tests do; says so and gives up where none is complete.
fn start(arguments: &[&str]) -> Option<Agent> {
    let mut command = agent::command(["demo"].iter().chain(arguments));
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    let mut demo = Agent::spawn(command);
    process::eventually(DEADLINE, "the demonstration begins", || {
        let is_over = !demo.is_running();
        (is_over || demo.stdout().contains("1. ")).then_some(())
    });
    let is_installed = !demo.stderr().contains("no complete PostgreSQL");
    if !is_installed {
        println!("skipped: {}", demo.stderr().trim_end());
    }
    is_installed.then_some(demo)
}

/// The line "in <directory>".
fn directory(demo: &Agent) -> PathBuf {
    let stdout = demo.stdout();
    let line = stdout.lines().find_map(|line| line.strip_prefix("in ")).expect("it says where it works");
    PathBuf::from(line)
}

/// Processes that name the directory on their command line: servers, agents, tools.
fn processes_in(directory: &Path) -> Vec<String> {
    let name = directory.to_str().expect("our directory's name is text");
    let entries = std::fs::read_dir("/proc").expect("/proc can be listed").filter_map(Result::ok);
    let lines = entries.filter_map(|entry| std::fs::read_to_string(entry.path().join("cmdline")).ok());
    lines.filter(|line| line.contains(name)).collect()
}

/// A process that was ended may take a moment to be gone.
fn wait_no_processes_in(directory: &Path) {
    let gone = || processes_in(directory).is_empty().then_some(());
    process::eventually(DEADLINE, "every process has ended", gone);
}

#[test]
fn tells_its_story_to_the_last_commit() {
    let Some(mut demo) = start(&[]) else { return };
    let directory = directory(&demo);
    let status = demo.wait(DEADLINE);
    let story = demo.stdout();
    assert!(status.success(), "{status}: {story}\n{}", demo.stderr());
    for words in [
        "kill -9",
        "caught up",
        "$ seawall find",
        "$ seawall window",
        "--exclusive",
        "main: ok, streaming",
        "The same, to the last",
    ] {
        assert!(story.contains(words), "no {words:?} in:\n{story}");
    }
    assert!(story.lines().all(|line| line.len() <= 200), "{story}");
    assert!(!directory.exists(), "{} is still there", directory.display());
    wait_no_processes_in(&directory);
}

#[test]
fn puts_everything_away_when_interrupted() {
    let Some(mut demo) = start(&[]) else { return };
    let directory = directory(&demo);
    process::eventually(DEADLINE, "the agent streams", || demo.stdout().contains("3. ").then_some(()));
    assert!(!processes_in(&directory).is_empty());
    demo.signal(Signal::INT);
    assert_eq!(demo.wait(DEADLINE).code(), Some(130));
    assert!(demo.stderr().contains("interrupted: everything is stopped and removed"));
    assert!(!directory.exists(), "{} is still there", directory.display());
    wait_no_processes_in(&directory);
}

#[test]
fn says_what_is_missing() {
    let mut command = agent::command(["demo"]);
    let output = process::run(command.env("SEAWALL_PG_BIN", "/nowhere"), DEADLINE);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(69), "{stderr}");
    assert!(stderr.contains("/nowhere lacks initdb") && stderr.contains("`make demo` installs one"), "{stderr}");
}
