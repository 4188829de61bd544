//! Owns: why a configuration was refused, and where the reason stands.
//! Does not own: what is wrong inside a connection string (`postgres`).

use std::fmt;
use std::path::PathBuf;

use crate::error::{Advice, Disposition, ExitCode};
use crate::postgres::ConninfoError;
use crate::units::{DURATION_EXAMPLE, SIZE_EXAMPLE};

/// Where a value was given. Later ones win: file < environment < flag.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    Default,
    File { path: PathBuf, line: usize },
    Variable(String),
    Flag(&'static str),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Default => f.write_str("default"),
            Source::File { path, line } => write!(f, "{}:{line}", path.display()),
            Source::Variable(name) => f.write_str(name),
            Source::Flag(name) => f.write_str(name),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("no configuration: {} not found, and nothing given by flags or variables", paths(.searched))]
    Nothing { searched: Vec<PathBuf> },

    #[error("could not read {}: {cause}", .path.display())]
    Read { path: PathBuf, cause: String, permission: bool },

    #[error("refused to read {}: others may write it (mode {mode:04o})", .path.display())]
    Writable { path: PathBuf, mode: u32 },

    #[error("could not read {source_place}: {problem}")]
    Syntax { source_place: Source, problem: String },

    #[error("unknown key {key} in {source_place}{}", suggestion(.nearest))]
    UnknownKey { source_place: Source, key: String, nearest: Option<String> },

    /// `what` with its verb: `[http] is`, "several repositories are".
    #[error("{what} not available in this version ({source_place})")]
    NotAvailable { source_place: Source, what: String },

    /// `value` is `None` where it could be secret.
    #[error("invalid {key}{} in {source_place}: expected {expected}", shown(.value))]
    Invalid { source_place: Source, key: String, value: Option<String>, expected: String },

    #[error("{key} is missing")]
    Missing { key: String, example: String },

    #[error("{first} and {second} are both given ({source_place})")]
    Conflict { source_place: Source, first: String, second: String },

    #[error("{what} needs {needed} ({source_place})")]
    Needs { source_place: Source, what: String, needed: String },

    /// `what` begins with the key.
    #[error("{what} ({source_place})")]
    Contradiction { source_place: Source, what: String, hint: String },

    #[error("repositories {first} and {second} are the same place ({source_place})")]
    SamePlace { source_place: Source, first: String, second: String },

    #[error("could not understand {key} ({source_place})")]
    Postgres { source_place: Source, key: String, source: Box<ConninfoError> },

    #[error("{key} names repository \"{name}\", which is not configured ({source_place})")]
    UnknownRepository { source_place: Source, key: String, name: String, known: Vec<String> },

    #[error("there is no cluster \"{name}\"")]
    UnknownCluster { name: String, known: Vec<String> },

    #[error("several clusters are configured: {}", .known.join(", "))]
    SeveralClusters { known: Vec<String> },
}

fn paths(paths: &[PathBuf]) -> String {
    let names: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
    names.join(", ")
}

fn suggestion(nearest: &Option<String>) -> String {
    nearest.as_ref().map(|key| format!("; did you mean {key}?")).unwrap_or_default()
}

fn shown(value: &Option<String>) -> String {
    value.as_ref().map(|value| format!(" \"{value}\"")).unwrap_or_default()
}

impl Advice for ConfigError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            ConfigError::Nothing { .. } => {
                "give --postgres 'host=… user=…' and --repository file:///absolute/path, or \
                 write a configuration (`seawall init` prints one)"
                    .to_string()
            }
            ConfigError::Read { path, permission: true, .. } => {
                format!("may the user seawall runs as read {}?", path.display())
            }
            ConfigError::Read { .. } => "is the path given by --config or SEAWALL_CONFIG right?".to_string(),
            ConfigError::Writable { path, .. } => {
                format!("whoever writes it decides where WAL goes; run: chmod go-w {}", path.display())
            }
            ConfigError::Syntax { .. } => return None,
            ConfigError::UnknownKey { .. } => return None,
            ConfigError::NotAvailable { .. } => "remove it; nothing is accepted that would not take effect".to_string(),
            ConfigError::Invalid { .. } => return None,
            ConfigError::Missing { key, example } => format!("add it, for example: {key} = {example}"),
            ConfigError::Conflict { .. } => "keep one of the two".to_string(),
            ConfigError::Contradiction { hint, .. } => hint.clone(),
            ConfigError::Needs { needed, .. } => format!("add {needed}, or remove what needs it"),
            ConfigError::SamePlace { .. } => "one copy would count as two: name it once".to_string(),
            ConfigError::Postgres { source, .. } => return source.hint(),
            ConfigError::UnknownRepository { known, .. } if known.is_empty() => {
                "add [repositories.NAME] with url = \"file:///absolute/path\" or \"s3://bucket/prefix\"".to_string()
            }
            ConfigError::UnknownRepository { known, .. } => format!("configured: {}", known.join(", ")),
            ConfigError::UnknownCluster { known, .. } if known.is_empty() => {
                "without a configuration file the one cluster is called main".to_string()
            }
            ConfigError::UnknownCluster { known, .. } => format!("configured: {}", known.join(", ")),
            ConfigError::SeveralClusters { .. } => "say which one with --cluster NAME".to_string(),
        })
    }

    fn disposition(&self) -> Disposition {
        Disposition::Operator
    }

    /// A mistake on the command line is a usage error; anywhere else it is a configuration error.
    fn exit_code(&self) -> ExitCode {
        match self {
            ConfigError::Read { permission: true, .. } => ExitCode::Permission,
            ConfigError::UnknownCluster { .. } | ConfigError::SeveralClusters { .. } => ExitCode::Usage,
            ConfigError::NotAvailable { source_place, .. }
            | ConfigError::Invalid { source_place, .. }
            | ConfigError::Conflict { source_place, .. }
            | ConfigError::Needs { source_place, .. }
            | ConfigError::SamePlace { source_place, .. }
            | ConfigError::UnknownRepository { source_place, .. }
            | ConfigError::Postgres { source_place, .. }
                if matches!(source_place, Source::Flag(_)) =>
            {
                ExitCode::Usage
            }
            ConfigError::Postgres { source, .. } => source.exit_code(),
            _ => ExitCode::Config,
        }
    }
}

/// What a value should have been.
pub(super) fn expected_duration(range: &str) -> String {
    format!("{DURATION_EXAMPLE}, {range}")
}

pub(super) fn expected_size(range: &str) -> String {
    format!("{SIZE_EXAMPLE}, {range}")
}
