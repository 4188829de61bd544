//! Owns: where log lines go and how they look: standard error, as text or JSON, and how many of them; the names of all
//! metrics, and the events that are counted (`meters`).
//! Does not own: what is said (whoever has something to say), answers to commands (`cli/output.rs`), where metrics are
//! read (`monitor`).

pub mod meters;

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::util::SubscriberInitExt;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

/// How much is said; each step says more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verbosity {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl Verbosity {
    const ALL: [Verbosity; 5] =
        [Verbosity::Error, Verbosity::Warn, Verbosity::Info, Verbosity::Debug, Verbosity::Trace];

    /// `steps` louder, or quieter when negative.
    pub fn louder(self, steps: i32) -> Verbosity {
        let at = (self as i32).saturating_add(steps).clamp(0, Self::ALL.len() as i32 - 1);
        Self::ALL[at as usize]
    }

    fn directive(self) -> &'static str {
        match self {
            Verbosity::Error => "error",
            Verbosity::Warn => "warn",
            Verbosity::Info => "warn,seawall=info",
            Verbosity::Debug => "warn,seawall=debug",
            Verbosity::Trace => "warn,seawall=trace",
        }
    }
}

/// Sets the process' log up, once; `RUST_LOG` says it in detail where it is set.
pub fn set_up(format: LogFormat, verbosity: Verbosity) {
    let chosen = std::env::var("RUST_LOG").ok().filter(|directives| !directives.is_empty());
    let parsed = chosen.and_then(|directives| EnvFilter::try_new(directives).ok());
    let filter = parsed.unwrap_or_else(|| EnvFilter::new(verbosity.directive()));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    // A second call (tests) keeps the first one's settings.
    let _ = match format {
        LogFormat::Text => builder.with_ansi(std::io::stderr().is_terminal()).finish().try_init(),
        LogFormat::Json => builder.json().flatten_event(true).with_ansi(false).finish().try_init(),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verbosity_stays_within_its_bounds() {
        assert_eq!(Verbosity::Warn.louder(1), Verbosity::Info);
        assert_eq!(Verbosity::Info.louder(-1), Verbosity::Warn);
        assert_eq!(Verbosity::Info.louder(-9), Verbosity::Error);
        assert_eq!(Verbosity::Info.louder(255), Verbosity::Trace);
    }
}
