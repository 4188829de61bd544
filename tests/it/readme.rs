//! What the README promises about commands and configuration, held against the program.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use seawall::config;

use crate::support::agent;

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

/// Not run: they would need the server they speak of. But every verb and every flag must exist.
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
