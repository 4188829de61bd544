//! Owns: why a connection string was refused. No variant ever holds a password, or text that could be part of one.
//! Does not own: where the connection string came from (`config` adds that).

use std::fmt;
use std::path::PathBuf;

use crate::error::{Advice, Disposition, ExitCode};

/// Where a setting was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    String,
    Service { name: String, path: PathBuf },
    Variable(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::String => f.write_str("the connection string"),
            Origin::Service { name, path } => write!(f, "service {name} in {}", path.display()),
            Origin::Variable(name) => write!(f, "the environment variable {name}"),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConninfoError {
    /// `at` counts characters from 1.
    #[error("could not read the connection string at character {at}: {problem}")]
    Syntax { at: usize, problem: &'static str },

    /// `keyword` is `None` where it could be a piece of a password written without quotes.
    #[error("unknown keyword{} in {origin}{}", named(.keyword), suggestion(.nearest))]
    UnknownKeyword { origin: Origin, keyword: Option<String>, nearest: Option<&'static str> },

    /// `value` is `None` where showing it could show a secret.
    #[error("invalid {keyword}{} in {origin}: expected {expected}", named(.value))]
    InvalidValue { origin: Origin, keyword: &'static str, value: Option<String>, expected: &'static str },

    /// Asked for on purpose, and not built: going on would be weaker, or other, than asked.
    #[error("{keyword}{} is not available in this version (asked for in {origin})", equals(.value))]
    NotAvailable { origin: Origin, keyword: &'static str, value: Option<String>, instead: &'static str },

    #[error("could not match {given} {what} to {hosts} hosts")]
    ListLength { what: &'static str, given: usize, hosts: usize },

    #[error("service {name} is not defined in {}", list(.searched))]
    NoService { name: String, searched: Vec<PathBuf> },

    #[error("could not read service file {} line {line}: {problem}", .path.display())]
    ServiceSyntax { path: PathBuf, line: usize, problem: &'static str },

    #[error("could not read {what} {}: {cause}", .path.display())]
    ReadFile { what: &'static str, path: PathBuf, cause: String, permission: bool },

    #[error("no user to connect as: the operating system has no name for this process' user")]
    NoUser,
}

fn named(text: &Option<String>) -> String {
    text.as_ref().map(|text| format!(" \"{text}\"")).unwrap_or_default()
}

fn equals(text: &Option<String>) -> String {
    text.as_ref().map(|text| format!("={text}")).unwrap_or_default()
}

fn suggestion(nearest: &Option<&'static str>) -> String {
    nearest.map(|name| format!("; did you mean \"{name}\"?")).unwrap_or_default()
}

fn list(paths: &[PathBuf]) -> String {
    let names: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
    if names.is_empty() { "any service file (none was found)".to_string() } else { names.join(" or ") }
}

impl Advice for ConninfoError {
    fn hint(&self) -> Option<String> {
        let text = match self {
            ConninfoError::Syntax { .. } => {
                "write host=db user=seawall, values with spaces in quotes (password='a b'), or \
                 postgresql://user@host/db with special characters percent-encoded (%40 for @, %2F for /)"
            }
            ConninfoError::UnknownKeyword { keyword: None, .. } => {
                "does the password contain a space? Then put it in quotes: password='a b'"
            }
            ConninfoError::UnknownKeyword { .. } => return None,
            ConninfoError::InvalidValue { value: None, .. } => {
                "does the password contain / : @ ? or #? In a URI they are percent-encoded (%2F for /, %40 for @)"
            }
            ConninfoError::InvalidValue { .. } => return None,
            ConninfoError::NotAvailable { instead, .. } => instead,
            ConninfoError::ListLength { .. } => "give one value for all hosts where that is allowed, or one per host",
            ConninfoError::NoService { .. } => {
                "add a [name] section to ~/.pg_service.conf, or point PGSERVICEFILE to the file that has it"
            }
            ConninfoError::ServiceSyntax { .. } => "lines are [name], keyword=value, or # comments",
            ConninfoError::ReadFile { permission: true, .. } => "may the user this process runs as read it?",
            ConninfoError::ReadFile { .. } => "does the file exist, and is it a plain text file?",
            ConninfoError::NoUser => "add user=… to the connection string, or set PGUSER",
        };
        Some(text.to_string())
    }

    fn disposition(&self) -> Disposition {
        Disposition::Operator
    }

    fn exit_code(&self) -> ExitCode {
        match self {
            ConninfoError::ReadFile { permission: true, .. } => ExitCode::Permission,
            _ => ExitCode::Config,
        }
    }
}
