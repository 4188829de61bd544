//! The house rules a reader relies on, checked: who may import whom, what each kind of file keeps out.
//!
//! Rules look at code: comments and `#[cfg(test)]` parts are taken out first, except where a rule is about them.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

/// Longer files are two concepts, or a table that wants a file of its own.
const LINES_MAX: usize = 900;

/// No IO, clock, randomness, async: what they do depends on their arguments alone.
const PURE: &[&str] = &[
    "src/wal/",
    "src/codec/",
    "src/receiver/progress.rs",
    "src/restore/execute/members.rs",
    "src/restore/execute/settings.rs",
    "src/receiver/framer.rs",
    "src/receiver/resume.rs",
    "src/continuity.rs",
    "src/repository/layout.rs",
    "src/repository/layout/",
    "src/repository/s3/options.rs",
    "src/repository/s3/answer.rs",
    "src/replication/message.rs",
    "src/replication/command.rs",
    "src/replication/framing.rs",
    "src/replication/security.rs",
    "src/replication/tls/names.rs",
    "src/replication/tls/certificate.rs",
    "src/replication/tls/fault.rs",
    "src/archiver/queue.rs",
    "src/archiver/tail.rs",
    "src/agent/known.rs",
    "src/catalog/damage.rs",
    "src/catalog/digest.rs",
    "src/catalog/union.rs",
    "src/catalog/index.rs",
    "src/catalog/lease.rs",
    "src/catalog/ledger.rs",
    "src/catalog/backup.rs",
    "src/catalog/manifest.rs",
    "src/catalog/manifest/",
    "src/catalog/shelf.rs",
    "src/replication/base_backup.rs",
    "src/monitor/backup.rs",
    "src/restore/prefetch/window.rs",
    "src/restore/target.rs",
    "src/restore/plan.rs",
    "src/restore/reach.rs",
    "src/retention/calendar.rs",
    "src/retention/inventory.rs",
    "src/retention/needs.rs",
    "src/retention/policy.rs",
    "src/retention/survey.rs",
    "src/retention/plan.rs",
    "src/catalog/events.rs",
    "src/cli/gaps/page.rs",
    "src/cli/gaps/drawing.rs",
    "src/cli/gaps/report.rs",
    "src/monitor/health.rs",
    "src/monitor/status.rs",
    "src/verify/chain.rs",
    "src/verify/files.rs",
    "src/verify/quick.rs",
    "src/verify/record.rs",
    "src/verify/report.rs",
    "src/error.rs",
    "src/schedule.rs",
    "src/schedule/",
    "src/secret.rs",
    "src/units.rs",
];
const IMPURE: &[&str] =
    &["tokio", "std::fs", "std::net", "SystemTime::now", "Instant::now", "async fn", "async move", "fastrand"];

/// Where a third-party crate may be named.
const ADDRESSES: &[(&str, &[&str])] = &[
    ("clap", &["src/cli/", "src/main.rs"]),
    ("indicatif", &["src/cli/"]),
    ("rustls", &["src/replication/", "src/repository/s3/"]),
    ("webpki", &["src/replication/"]),
    ("tokio_rustls", &["src/replication/"]),
    ("toml", &["src/config/"]),
    ("zstd", &["src/codec/"]),
    ("crc32c", &["src/wal/", "src/catalog/manifest/"]),
    ("tar", &["src/codec/tar.rs"]),
    ("flate2", &["src/codec/inflate.rs"]),
    ("lz4_flex", &["src/codec/inflate.rs"]),
    ("age", &["src/codec/encrypt.rs"]),
    ("aws_sdk_s3", &["src/repository/s3/"]),
    ("aws_config", &["src/repository/s3/"]),
    ("aws_smithy_http_client", &["src/repository/s3/"]),
    ("aws_smithy_runtime_api", &["src/repository/s3/"]),
    ("aws_smithy_types", &["src/repository/s3/"]),
    ("http_body", &["src/repository/s3/"]),
    ("axum", &["src/monitor/"]),
    ("metrics", &["src/telemetry/", "src/monitor/"]),
    ("hyper", &["src/monitor/"]),
    ("hyper_util", &["src/monitor/"]),
    ("metrics_exporter_prometheus", &["src/monitor/"]),
    ("x509_parser", &["src/replication/"]),
    ("rustls_native_certs", &["src/replication/"]),
    ("croner", &["src/schedule/line.rs"]),
    ("maud", &["src/cli/gaps/"]),
    ("close_fds", &["src/cli/wal_get/helper.rs"]),
];

/// The folders and files directly below src/, lowest first: a module imports from its own level or below.
const LEVELS: &[&[&str]] = &[
    &["wal", "codec", "error", "schedule", "secret", "telemetry", "units"],
    &["replication", "repository", "spool"],
    &["catalog", "continuity", "postgres"],
    &["receiver", "archiver", "backup", "restore", "verify"],
    &["receiver", "archiver", "backup", "restore", "retention"],
    &["config", "monitor"],
    &["agent"],
    &["cli"],
];
/// Services: they define their `Options` and `Status`, and leave it to the modules above to connect them.
const SERVICES: &[&str] = LEVELS[3];
/// But for this: what the receiver gives is what the archiver takes, and their words for it are the receiver's.
const TAKES_FROM: (&str, &str) = ("archiver", "receiver");
/// Models of the world outside, which know everything and are used by nothing in the program.
const TESTKIT: &str = "src/testkit/";

struct Source {
    path: String,
    text: String,
    /// Without comments, literals' contents, and everything from the first `#[cfg(test)]` module on.
    code: String,
}

impl Source {
    fn is_in(&self, places: &[&str]) -> bool {
        places.iter().any(|place| if place.ends_with('/') { self.path.starts_with(place) } else { self.path == *place })
    }

    /// A file of tests beside the file they test, or one of several.
    fn is_tests(&self) -> bool {
        self.path.ends_with("/tests.rs") || self.path.contains("/tests/")
    }

    /// The folder or file directly below src/: `wal` for src/wal/lsn.rs, `error` for src/error.rs.
    fn module(&self) -> &str {
        let below = self.path.strip_prefix("src/").unwrap_or(&self.path);
        below.split('/').next().unwrap_or(below).trim_end_matches(".rs")
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn sources() -> Vec<Source> {
    let mut paths = Vec::new();
    let mut folders = vec![root().join("src")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("src/ can be listed") {
            let path = entry.expect("src/ can be listed").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                paths.push(path);
            }
        }
    }
    paths.sort();
    let read = |path: std::path::PathBuf| {
        let text = fs::read_to_string(&path).expect("a source file is text");
        let path =
            path.strip_prefix(root()).expect("it is below the root").to_str().expect("its name is text").to_owned();
        let mut source = Source { path, text, code: String::new() };
        if !source.is_tests() {
            source.code = code_of(&source.text);
        }
        source
    };
    paths.into_iter().map(read).collect()
}

/// Blanks what is not code, and ends where the tests begin (they stand at the bottom of a file).
fn code_of(text: &str) -> String {
    let code = without_comments_and_literals(text);
    let end = code.match_indices("#[cfg(test)]").find(|(at, mark)| {
        let item = code[at + mark.len()..].trim_start();
        item.starts_with("mod ") && !item.lines().next().is_some_and(|line| line.trim_end().ends_with(';'))
    });
    end.map_or(code.clone(), |(at, _)| code[..at].to_owned())
}

/// Keeps newlines, so that line numbers stay true.
fn without_comments_and_literals(text: &str) -> String {
    let characters: Vec<char> = text.chars().collect();
    let mut code = String::with_capacity(text.len());
    let mut at = 0;
    while at < characters.len() {
        let length = match characters[at] {
            '/' if characters.get(at + 1) == Some(&'/') => line_length(&characters[at..]),
            '/' if characters.get(at + 1) == Some(&'*') => block_comment_length(&characters[at..]),
            'r' | 'b' | 'c' if !ends_in_word(&code) => raw_string_length(&characters[at..]),
            '"' => string_length(&characters[at..]),
            '\'' => character_length(&characters[at..]),
            _ => 0,
        };
        if length == 0 {
            code.push(characters[at]);
            at += 1;
        } else {
            let skipped = &characters[at..at + length];
            code.push(' ');
            code.extend(skipped.iter().filter(|character| **character == '\n'));
            at += length;
        }
    }
    code
}

fn ends_in_word(code: &str) -> bool {
    code.chars().next_back().is_some_and(is_word)
}

fn line_length(text: &[char]) -> usize {
    text.iter().position(|character| *character == '\n').unwrap_or(text.len())
}

fn block_comment_length(text: &[char]) -> usize {
    let mut depth = 0_usize;
    let mut at = 0;
    while at < text.len() {
        match (text[at], text.get(at + 1)) {
            ('/', Some('*')) => (depth, at) = (depth + 1, at + 2),
            ('*', Some('/')) => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at
}

/// `r"…"`, `br#"…"#`; 0 when it is none.
fn raw_string_length(text: &[char]) -> usize {
    let Some(prefix) = text.iter().take(2).position(|character| *character == 'r') else { return 0 };
    let hashes = text[prefix + 1..].iter().take_while(|character| **character == '#').count();
    let start = prefix + 1 + hashes;
    if text.get(start) != Some(&'"') {
        return 0;
    }
    let is_end =
        |at: &usize| text[*at] == '"' && text[at + 1..].iter().take(hashes).filter(|c| **c == '#').count() == hashes;
    (start + 1..text.len()).find(is_end).map_or(text.len(), |end| end + 1 + hashes)
}

fn string_length(text: &[char]) -> usize {
    let mut at = 1;
    while at < text.len() && text[at] != '"' {
        at += if text[at] == '\\' { 2 } else { 1 };
    }
    (at + 1).min(text.len())
}

/// A character literal; 0 for a lifetime.
fn character_length(text: &[char]) -> usize {
    match text {
        ['\'', '\\', _, rest @ ..] => 3 + rest.iter().position(|c| *c == '\'').map_or(0, |end| end + 1),
        ['\'', _, '\'', ..] => 3,
        _ => 0,
    }
}

fn is_word(character: char) -> bool {
    character.is_alphanumeric() || character == '_'
}

/// The line numbers on which `word` stands as a word of its own (it may hold `::` or a space itself).
fn lines_with(code: &str, word: &str) -> Vec<usize> {
    let stands_alone = |(at, found): &(usize, &str)| {
        let before = code[..*at].chars().next_back();
        let after = code[at + found.len()..].chars().next();
        !(before.is_some_and(is_word) || word.ends_with(is_word) && after.is_some_and(is_word))
    };
    let line_of = |(at, _): (usize, &str)| code[..at].matches('\n').count() + 1;
    let lines: BTreeSet<usize> = code.match_indices(word).filter(stands_alone).map(line_of).collect();
    lines.into_iter().collect()
}

/// Fails with every breach at once, one per line as `path:line: rule`.
fn assert_none(breaches: Vec<String>) {
    assert!(breaches.is_empty(), "house rules broken:\n{}", breaches.join("\n"));
}

/// One breach per line of these sources that holds one of `words`.
fn forbid<'a>(sources: impl IntoIterator<Item = &'a Source>, words: &[&str], rule: &str) -> Vec<String> {
    let mut breaches = Vec::new();
    for source in sources {
        for word in words {
            for line in lines_with(&source.code, word) {
                breaches.push(format!("{}:{line}: `{word}`: {rule}", source.path));
            }
        }
    }
    breaches
}

#[test]
fn every_file_says_what_it_owns() {
    let says = |source: &Source| {
        let doc: Vec<_> = source.text.lines().take_while(|line| line.starts_with("//!")).collect();
        doc.iter().any(|line| line.contains("Owns"))
    };
    let exempt = ["src/main.rs", "src/lib.rs"]; // the entry, and the map
    let silent = sources().into_iter().filter(|source| !source.is_in(&exempt) && !source.is_tests() && !says(source));
    assert_none(
        silent.map(|source| format!("{}:1: begins without a `//!` that says what it Owns", source.path)).collect(),
    );
}

#[test]
fn only_durable_rs_syncs_and_renames() {
    let sources = sources();
    let others = sources.iter().filter(|source| source.path != "src/repository/durable.rs");
    let words = ["fsync", "fdatasync", "sync_all", "sync_data", "syncfs", "rename(", "renameat", "rename_with"];
    assert_none(forbid(others, &words, "only src/repository/durable.rs syncs and renames"));
}

#[test]
fn only_layout_rs_builds_object_names() {
    let sources = sources();
    let places = ["src/repository/layout.rs", "src/repository/backend.rs", TESTKIT];
    let others = sources.iter().filter(|source| !source.is_in(&places));
    assert_none(forbid(others, &["Key::new("], "only src/repository/layout.rs builds object names"));
}

#[test]
fn pure_files_stay_pure() {
    let sources = sources();
    let pure = sources.iter().filter(|source| source.is_in(PURE));
    assert_none(forbid(pure, IMPURE, "this file is pure: no IO, clock, randomness, async"));
}

#[test]
fn channels_are_bounded() {
    let words = ["unbounded_channel", "UnboundedSender", "UnboundedReceiver"];
    assert_none(forbid(&sources(), &words, "every channel is bounded, and says why by that bound"));
}

#[test]
fn nothing_is_left_to_do() {
    let sources = sources();
    let mut breaches = forbid(&sources, &["todo!(", "unimplemented!("], "finish it");
    for source in &sources {
        for (index, line) in source.text.lines().enumerate() {
            if ["TODO", "FIXME", "XXX"].iter().any(|mark| !lines_with(line, mark).is_empty()) {
                breaches.push(format!("{}:{}: a note instead of the work: {}", source.path, index + 1, line.trim()));
            }
        }
    }
    assert_none(breaches);
}

#[test]
fn third_party_crates_have_one_address() {
    let sources = sources();
    let mut breaches = Vec::new();
    for (name, places) in ADDRESSES {
        let others = sources.iter().filter(|source| !source.is_in(places) && !source.is_in(&[TESTKIT]));
        let uses = [format!("{name}::"), format!("use {name}")];
        let uses: Vec<_> = uses.iter().map(String::as_str).collect();
        // `crate::…::zstd::` and a local `mod zstd` are not the crate.
        let found = forbid(others, &uses, &format!("{name} is used in {} only", places.join(", ")));
        breaches.extend(found.into_iter().filter(|breach| !is_own_path(&sources, breach, name)));
    }
    assert_none(breaches);
}

/// Whether every mention on the breach's line is a path of our own, like `codec::zstd::`.
fn is_own_path(sources: &[Source], breach: &str, name: &str) -> bool {
    let mut parts = breach.splitn(3, ':');
    let (path, line) = (parts.next(), parts.next().and_then(|line| line.parse::<usize>().ok()));
    let source = sources.iter().find(|source| Some(source.path.as_str()) == path);
    let text = source.zip(line).and_then(|(source, line)| source.code.lines().nth(line - 1));
    text.is_some_and(|text| {
        text.match_indices(name).all(|(at, _)| text[..at].ends_with("::") && !text[..at].ends_with(" ::"))
    })
}

#[test]
fn files_are_of_readable_length() {
    let bound = |source: &Source| !source.is_in(&[TESTKIT]) && !source.is_tests();
    let long = sources().into_iter().filter(|source| bound(source) && source.text.lines().count() > LINES_MAX);
    let line_count = |source: &Source| source.text.lines().count();
    assert_none(
        long.map(|source| format!("{}:{}: over {LINES_MAX} lines", source.path, line_count(&source))).collect(),
    );
}

#[test]
fn imports_point_downward() {
    let sources = sources();
    let level = |module: &str| LEVELS.iter().position(|modules| modules.contains(&module));
    let mut breaches = Vec::new();
    for source in sources.iter().filter(|source| !source.is_in(&["src/main.rs", "src/lib.rs", TESTKIT])) {
        let own = source.module();
        let Some(own_level) = level(own) else {
            breaches.push(format!("{}:1: `{own}` has no level in tests/it/tidy.rs", source.path));
            continue;
        };
        for (imported, line) in imports(&source.code) {
            let rule = match level(&imported) {
                _ if imported == own => continue,
                None if imported == "testkit" => "the program never uses the testkit",
                None => continue, // an item of lib.rs itself
                Some(theirs) if theirs > own_level => "a lower module never imports a higher one",
                Some(_) if (own, imported.as_str()) == TAKES_FROM => continue,
                Some(_) if SERVICES.contains(&own) && SERVICES.contains(&imported.as_str()) => {
                    "services do not import one another"
                }
                Some(_) => continue,
            };
            breaches.push(format!("{}:{line}: imports `{imported}`: {rule}", source.path));
        }
    }
    assert_none(breaches);
}

/// The modules named as `crate::module` or inside `crate::{…}`, with their line numbers.
fn imports(code: &str) -> Vec<(String, usize)> {
    let mut found = Vec::new();
    for (at, mark) in code.match_indices("crate::") {
        if code[..at].chars().next_back().is_some_and(is_word) {
            continue;
        }
        let line = code[..at].matches('\n').count() + 1;
        let rest = &code[at + mark.len()..];
        match rest.strip_prefix('{') {
            Some(group) => found.extend(first_names(group).into_iter().map(|name| (name, line))),
            None => found.push((rest.chars().take_while(|character| is_word(*character)).collect(), line)),
        }
    }
    found
}

/// `a::{b, c}, d::e}` begins with `a` and `d`.
fn first_names(group: &str) -> Vec<String> {
    let mut depth = 0;
    let mut names = vec![String::new()];
    let mut is_path_start = true;
    for character in group.chars() {
        match character {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                names.push(String::new());
                is_path_start = true;
            }
            ':' if depth == 0 => is_path_start = false,
            _ if depth == 0 && is_path_start && is_word(character) => {
                names.last_mut().expect("it starts with one").push(character);
            }
            _ => {}
        }
    }
    names.retain(|name| !name.is_empty());
    names
}

/// A comment that says `proto-notes/NN-name.md`, "section": the note is there, and has the section.
#[test]
fn citations_of_the_notes_resolve() {
    let mut breaches = Vec::new();
    let mut count = 0;
    for source in sources() {
        let comments = comments_on_one_line(&source.text);
        let mentions = comments.split("proto-notes/").skip(1);
        for rest in mentions.filter(|rest| rest.starts_with(|c: char| c.is_ascii_digit())) {
            count += 1;
            breaches.extend(citation_fault(rest).map(|fault| format!("{}: {fault}", source.path)));
        }
    }
    assert!(count > 10, "the notes are cited, and this test finds where");
    assert_none(breaches);
}

/// A citation may run over lines.
fn comments_on_one_line(text: &str) -> String {
    let words = |line: &str| line.trim_start().trim_start_matches(['/', '!']).trim().to_owned();
    text.lines().map(words).collect::<Vec<_>>().join(" ")
}

/// What is wrong with the citation that `text` begins with, behind `proto-notes/`.
fn citation_fault(text: &str) -> Option<String> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.');
    let name = text.split(|c| !is_name(c)).next()?.trim_end_matches('.');
    let Ok(note) = fs::read_to_string(root().join("proto-notes").join(name)) else {
        return Some(format!("there is no proto-notes/{name}"));
    };
    let headings: Vec<&str> = note.lines().filter_map(|line| line.strip_prefix("## ")).collect();
    let missing = sections_cited(&text[name.len()..]).into_iter().find(|section| !headings.contains(section));
    missing.map(|section| format!("proto-notes/{name} has no section {section:?}"))
}

/// `, "a", "b" and "c".` cites a, b and c.
fn sections_cited(text: &str) -> Vec<&str> {
    let mut sections = Vec::new();
    let mut rest = text.trim_start_matches('`');
    loop {
        let separator = [", \"", " and \""].into_iter().find_map(|separator| rest.strip_prefix(separator));
        let Some((section, after)) = separator.and_then(|rest| rest.split_once('"')) else { return sections };
        sections.push(section);
        rest = after;
    }
}

/// What the repository says must hold on any machine: no place or tool of the one it was written on.
#[test]
fn committed_files_name_no_workplace() {
    let listed = Command::new("git").args(["ls-files", "-z"]).current_dir(root()).output();
    let Some(listed) = listed.ok().filter(|output| output.status.success()) else {
        println!("skipped: not a git checkout");
        return;
    };
    // Put together here, so that this file does not hold them itself.
    let words = [["/wo", "rk/"], ["../sha", "red"], ["far", "m-"], ["/opt/whe", "els"]].map(|halves| halves.concat());
    let mut breaches = Vec::new();
    for path in String::from_utf8_lossy(&listed.stdout).split_terminator('\0') {
        let Ok(bytes) = fs::read(root().join(path)) else { continue }; // deleted, not committed yet
        let text = String::from_utf8_lossy(&bytes);
        for (index, line) in text.lines().enumerate() {
            for word in words.iter().filter(|word| names(line, word)) {
                breaches.push(format!("{path}:{}: `{word}` means nothing elsewhere", index + 1));
            }
        }
    }
    assert_none(breaches);
}

/// Whether a line holds `word` where a path or a name begins, not within a longer one.
fn names(line: &str, word: &str) -> bool {
    let begins =
        |(at, _): (usize, &str)| !line[..at].chars().next_back().is_some_and(|before| is_word(before) || before == '.');
    line.match_indices(word).any(begins)
}

#[test]
fn the_rules_see_code_and_nothing_else() {
    let text = "//! fsync\nlet a = \"rename\"; // rename\nlet b = r#\"sync_all\"#; /* sync_data /* x */ fsync */ c('\"');\n\
                fs::rename();\n#[cfg(test)]\nmod tests { fsync }\n";
    let code = code_of(text);
    assert_eq!(lines_with(&code, "rename"), [4]);
    assert!(lines_with(&code, "fsync").is_empty() && lines_with(&code, "sync_all").is_empty());
    assert!(lines_with("renamed(); tokio_rustls::x", "rename").is_empty());
    let modules: Vec<_> = imports("use crate::{wal::{Lsn, b}, error};\ncrate::codec::x()").into_iter().collect();
    assert_eq!(modules, [("wal".to_owned(), 1), ("error".to_owned(), 1), ("codec".to_owned(), 2)]);
}
