//! Owns: what an error means to the one who gets it: a hint, the caller's next move, the exit code.
//! Does not own: any particular error; each module has its own enum and implements [`Advice`] for it.

/// What the loop that got an error does next. Loops match on this, never on text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disposition {
    /// The same call may succeed in a moment.
    Retry,
    /// This connection is finished; a new one may succeed.
    Reconnect,
    /// The cluster stops: going on could damage the archive. Nothing further is stored or acknowledged.
    Stop,
    /// Nothing gets better until somebody changes something; keep trying slowly, say it loudly.
    Operator,
}

/// The documented exit codes. `wal-get` has a contract of its own: see `restore/wal_get.rs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitCode {
    Success = 0,
    /// Gaps, faults, a target that is not reachable, something not protected.
    Finding = 1,
    Usage = 64,
    /// Conflicting or bad data.
    Data = 65,
    /// Server or store did not answer.
    Unavailable = 69,
    /// A bug in this program.
    Internal = 70,
    /// Lease held, slot busy: try again.
    TryAgain = 75,
    Permission = 77,
    Config = 78,
}

impl ExitCode {
    /// The class of an error in a word, for counting.
    pub fn word(self) -> &'static str {
        match self {
            ExitCode::Success => "success",
            ExitCode::Finding => "finding",
            ExitCode::Usage => "usage",
            ExitCode::Data => "data",
            ExitCode::Unavailable => "unavailable",
            ExitCode::Internal => "internal",
            ExitCode::TryAgain => "try_again",
            ExitCode::Permission => "permission",
            ExitCode::Config => "config",
        }
    }
}

/// What an error tells people and loops beyond its message.
pub trait Advice: std::error::Error {
    /// A sentence or question an operator can act on.
    fn hint(&self) -> Option<String> {
        None
    }
    fn disposition(&self) -> Disposition;
    fn exit_code(&self) -> ExitCode;
}

/// An error on its way to a person: the message with its causes, a hint, an exit code.
///
/// Commands and the agent's loops pass this on; modules convert their own enums with [`Failure::from`].
#[derive(Clone, Debug)]
pub struct Failure {
    pub message: String,
    pub hint: Option<String>,
    pub disposition: Disposition,
    pub exit_code: ExitCode,
}

impl Failure {
    pub fn new(exit_code: ExitCode, message: impl Into<String>) -> Failure {
        Failure { message: message.into(), hint: None, disposition: Disposition::Operator, exit_code }
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Failure {
        self.hint = Some(hint.into());
        self
    }

    pub fn disposition(mut self, disposition: Disposition) -> Failure {
        self.disposition = disposition;
        self
    }

    /// Names the step that failed, in front of the message.
    pub fn context(mut self, step: impl std::fmt::Display) -> Failure {
        self.message = format!("{step}: {}", self.message);
        self
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl<E: Advice> From<E> for Failure {
    fn from(error: E) -> Failure {
        let mut message = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            message.push_str(": ");
            message.push_str(&cause.to_string());
            source = cause.source();
        }
        Failure { message, hint: error.hint(), disposition: error.disposition(), exit_code: error.exit_code() }
    }
}
