//! Owns: how answers and errors look: text, tables, JSON.
//! Does not own: what they say (the verbs).

use std::io::Write;

use comfy_table::{ContentArrangement, Table, presets};
use jiff::Timestamp;
use serde::Serialize;
use serde_json::json;

use crate::error::Failure;
use crate::telemetry::LogFormat;

/// The version of every JSON answer.
pub const SCHEMA: u32 = 1;

/// Writes to standard output. Nobody reads on when it is closed (`seawall gaps | head`): that is no error.
pub fn text(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes());
    if !text.ends_with('\n') {
        let _ = out.write_all(b"\n");
    }
    let _ = out.flush();
}

/// One JSON object: `answer`'s fields after `"schema": 1`.
pub fn json(answer: &impl Serialize) {
    #[derive(Serialize)]
    struct Versioned<'a, T> {
        schema: u32,
        #[serde(flatten)]
        answer: &'a T,
    }
    let versioned = Versioned { schema: SCHEMA, answer };
    text(&serde_json::to_string_pretty(&versioned).expect("our answers have string keys and no failing serializers"));
}

/// One that says its schema itself.
pub fn json_as_it_is(answer: &impl Serialize) {
    text(&serde_json::to_string_pretty(answer).expect("our answers have string keys and no failing serializers"));
}

/// A word for people.
pub fn note(words: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr().lock(), "{words}");
}

/// An error: on standard error, as the log looks; with `--json` also as an object on standard output.
pub fn failure(failure: &Failure, code: u8, log_format: LogFormat, as_json: bool) {
    match log_format {
        LogFormat::Text => {
            note(format_args!("error: {}", failure.message));
            if let Some(hint) = &failure.hint {
                note(format_args!("hint: {hint}"));
            }
        }
        // Whatever the log's filter: this line is said.
        LogFormat::Json => note(LastLine {
            timestamp: Timestamp::now(),
            level: "ERROR",
            message: &failure.message,
            hint: failure.hint.as_deref(),
            exit_code: code,
        }),
    }
    if as_json {
        failure_json(failure, code);
    }
}

/// The error a process ends with, among the log's lines.
#[derive(Debug, Serialize)]
struct LastLine<'a> {
    timestamp: Timestamp,
    level: &'static str,
    message: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<&'a str>,
    exit_code: u8,
}

impl std::fmt::Display for LastLine<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&serde_json::to_string(self).map_err(|_| std::fmt::Error)?)
    }
}

pub fn failure_json(failure: &Failure, code: u8) {
    json(&json!({
        "error": { "message": failure.message, "hint": failure.hint, "exit_code": code },
    }));
}

/// A table without lines, as wide as the terminal where there is one.
pub fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic).set_header(header);
    table
}

/// The same, as wide as it is: for what will be copied.
pub fn wide_table(header: &[&str]) -> Table {
    let mut table = table(header);
    table.set_content_arrangement(ContentArrangement::Disabled);
    table
}

/// `12 B`, `3.5 MiB`.
pub fn size(bytes: u64) -> String {
    bytesize::ByteSize(bytes).display().iec().to_string()
}
