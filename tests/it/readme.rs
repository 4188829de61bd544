//! What the README promises about commands and configuration, held against the program.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use seawall::config;

use crate::support::agent::{self, Agent};
use crate::support::archived::{create_journal, note, notes};
use crate::support::postgres::{self, Server};
use crate::support::process::{self, Scratch};

const DEADLINE: Duration = process::DEADLINE;

fn readme() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).expect("there is a README")
}

#[test]
fn lists_every_key_of_the_configuration_as_the_program_knows_it() {
    let row = |doc: config::KeyDoc| {
        let default = doc.default.unwrap_or("required");
        format!("| `{}` | {} | {default} | {} |", doc.key, doc.kind, doc.effect)
    };
    let expected: Vec<String> = config::reference().into_iter().map(row).collect();
    let text = readme();
    let groups = ["clusters", "repositories", "spool", "http"].map(|group| format!("| `{group}."));
    let is_row = |line: &&str| groups.iter().any(|start| line.starts_with(start));
    let found: Vec<&str> = text.lines().filter(is_row).collect();
    assert_eq!(found, expected, "README.md's table should be:\n{}", expected.join("\n"));
}

/// Lines of `sh` blocks that run the program.
fn commands(text: &str) -> Vec<Vec<String>> {
    let mut in_shell = false;
    let mut found = Vec::new();
    for line in text.lines() {
        if let Some(language) = line.trim_start().strip_prefix("```") {
            in_shell = language == "sh";
        } else if in_shell {
            let line = line.split(" #").next().unwrap_or(line);
            let words: Vec<String> = line.split_whitespace().map(str::to_string).collect();
            if let Some(at) = words.iter().position(|word| word == "seawall" || word.ends_with("/seawall")) {
                found.push(words[at + 1..].to_vec());
            }
        }
    }
    found
}

/// Every verb and every flag must exist, also where a block is not run.
#[test]
fn shows_commands_that_exist() {
    let commands = commands(&readme());
    assert!(commands.len() >= 6, "{commands:?}");
    for command in commands {
        let verb = command.iter().find(|word| !word.starts_with('-')).unwrap_or_else(|| panic!("{command:?}"));
        let help = agent::seawall_ok([verb.as_str(), "--help"]);
        for flag in command.iter().filter(|word| word.starts_with("--")) {
            let name = flag.split('=').next().unwrap_or(flag);
            assert!(help.contains(name), "`seawall {}`: {verb} has no {name}", command.join(" "));
        }
    }
}

/// The table of commands names the verbs there are, and no others.
#[test]
fn names_every_command() {
    let help = agent::seawall_ok(["--help"]);
    let listed = help.lines().skip_while(|line| !line.starts_with("Commands:")).skip(1);
    // A verb stands two columns in; further in, its description goes on.
    let listed = listed.take_while(|line| !line.trim().is_empty()).filter_map(|line| line.strip_prefix("  "));
    let listed = listed.filter(|line| !line.starts_with(' ')).filter_map(|line| line.split_whitespace().next());
    let there: BTreeSet<&str> = listed.filter(|verb| *verb != "help").collect();
    let text = readme();
    let named = text.lines().filter_map(|line| line.strip_prefix("| `seawall "));
    let named: BTreeSet<&str> = named.filter_map(|line| line.split([' ', '`']).next()).collect();
    assert_eq!(named, there);
}

#[test]
fn links_lead_somewhere() {
    let text = readme();
    let targets = text.match_indices("](").filter_map(|(at, mark)| text[at + mark.len()..].split(')').next());
    for target in targets.filter(|target| !target.contains("://") && !target.starts_with('#')) {
        assert!(Path::new(env!("CARGO_MANIFEST_DIR")).join(target).exists(), "there is no {target}");
    }
}

/// The blocks in one language, of the part of the text between two headings.
fn blocks(text: &str, language: &str, from: &str, to: &str) -> Vec<String> {
    let start = text.find(from).unwrap_or_else(|| panic!("there is no {from:?}"));
    let end = text[start..].find(to).unwrap_or_else(|| panic!("there is no {to:?}")) + start;
    let mut found = Vec::new();
    let mut block: Option<String> = None;
    for line in text[start..end].lines() {
        match (&mut block, line.trim_start().strip_prefix("```")) {
            (None, Some(opened)) if opened == language => block = Some(String::new()),
            (Some(_), Some("")) => found.extend(block.take()),
            (Some(content), _) => {
                // A block inside a list is indented by three.
                content.push_str(line.strip_prefix("   ").unwrap_or(line));
                content.push('\n');
            }
            (None, _) => {}
        }
    }
    found
}

/// A reader's machine: the README's paths and its server, somewhere else.
struct Reader {
    scratch: Scratch,
    conninfo: String,
}

impl Reader {
    fn translate(&self, text: &str) -> String {
        let place = |name: &str| self.scratch.join(name).to_str().expect("our paths are text").to_string();
        text.replace("host=localhost user=seawall dbname=postgres", &self.conninfo)
            .replace("/etc/seawall/seawall.toml", &place("seawall.toml"))
            .replace("/mnt/wal/seawall", &place("repository"))
            .replace("/var/lib/postgresql/", &place(""))
    }

    /// As the server's user types it; stops at the first command that fails.
    fn shell(&self, script: &str) -> Command {
        let path = std::env::var("PATH").expect("there is a PATH");
        let binary = agent::binary_for_servers(&self.scratch);
        let directory = binary.parent().expect("it lies in a directory").display();
        let mut shell = Command::new("bash");
        process::as_service_user(shell.args(["-euo", "pipefail", "-c", &self.translate(script)]));
        shell.env("PATH", format!("{directory}:{path}")).env("SEAWALL_CONFIG", self.scratch.join("seawall.toml"));
        shell
    }

    fn run(&self, script: &str) -> String {
        process::run_ok(&mut self.shell(script), DEADLINE)
    }
}

/// The quick start from its check on, and both ways to restore, word for word.
#[test]
fn the_commands_it_shows_do_what_it_says() {
    let Some(major) = postgres::newest_major() else { return };
    let text = readme();
    let server = Server::builder(major).start();
    let reader = Reader { scratch: Scratch::new(), conninfo: server.conninfo() };
    let configuration = &blocks(&text, "toml", "## Quick start", "## Restore")[0];
    let without_password = configuration.lines().filter(|line| !line.starts_with("password_file"));
    let configuration = without_password.map(|line| format!("{line}\n")).collect::<String>();
    let path = reader.scratch.join("seawall.toml");
    fs::write(&path, reader.translate(&configuration)).expect("a configuration can be written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("our file's mode can be set");

    let start = blocks(&text, "sh", "## Quick start", "## Restore");
    let [init, begin, watch, backup] = &start[..] else { panic!("other blocks than this test knows: {start:#?}") };
    assert!(reader.run(init).contains("CREATE ROLE"));
    let (before, agent) = begin.split_at(begin.find("seawall run").expect("it ends with the agent"));
    // `check` has advice about this server: it has no limit for slots.
    reader.run(&before.replace("seawall check", "seawall check || true"));
    let mut agent = Agent::spawn(reader.shell(&format!("exec {}", agent.trim())));
    create_journal(&server);
    note(&server, "from the README");
    process::eventually(DEADLINE, "the first backup", || {
        assert!(agent.is_running());
        let listed = process::run(&mut reader.shell("seawall list --json"), DEADLINE);
        String::from_utf8_lossy(&listed.stdout).contains("\"complete\"").then_some(())
    });
    process::eventually(DEADLINE, "everything is archived, and all is well", || {
        let shown = process::run(&mut reader.shell(watch), DEADLINE);
        let text = String::from_utf8_lossy(&shown.stdout);
        (shown.status.success() && text.contains("main: ok") && text.contains("no gaps")).then_some(())
    });
    note(&server, "before the backup from cron");
    reader.run(backup);
    note(&server, "the last one");
    let lsn = server.flush_lsn();
    let acknowledged = format!("select restart_lsn >= '{lsn}' from pg_replication_slots");
    process::eventually(DEADLINE, "all of it is archived", || (server.value(&acknowledged) == "t").then_some(()));

    let restore = blocks(&text, "sh", "## Restore", "## Commands");
    let [restore, by_hand] = &restore[..] else { panic!("other blocks than this test knows: {restore:#?}") };
    let said = reader.run(restore);
    assert!(said.contains("pg_ctl"), "{said}");
    reader.run(by_hand);
    let expected = notes(&server);
    for name in ["restored", "by-hand"] {
        let restored = Server::builder(major).on_copy_of(&reader.scratch.join(name)).start_recovered();
        assert_eq!(notes(&restored.expect("it recovers")), expected, "{name}");
    }
}
