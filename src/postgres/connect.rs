//! Owns: trying the hosts of a connection string in order until one is reachable and of the wanted kind.
//! Does not own: parsing the string (`conninfo.rs`), the protocol (`replication`).

use super::TargetSessionAttrs;
use crate::error::{Advice, Disposition, ExitCode, Failure};
use crate::replication::{Address, ConnectError, Connection, Dial, Login, ReplicationError};

/// A session and what its server is.
#[derive(Debug)]
pub struct Connected {
    pub connection: Connection,
    pub login: Login,
    /// A standby, or a server in recovery.
    pub in_recovery: bool,
}

/// Every host's reason, in the order they were tried.
#[derive(Debug, thiserror::Error)]
#[error("{}", list(attempts))]
pub struct NoServer {
    attempts: Vec<(String, AttemptError)>,
}

#[derive(Debug, thiserror::Error)]
enum AttemptError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(transparent)]
    Session(#[from] ReplicationError),
    #[error("the server is {found}, target_session_attrs={wanted} wants another")]
    Unwanted { found: &'static str, wanted: &'static str },
    #[error("no host is configured")]
    NoHost,
}

fn list(attempts: &[(String, AttemptError)]) -> String {
    let each: Vec<String> = match attempts {
        [(_, only)] => vec![only.to_string()],
        several => several.iter().map(|(host, error)| format!("{host}: {error}")).collect(),
    };
    each.join("; ")
}

impl NoServer {
    /// The attempt an operator should look at first: one that was refused rather than not answered.
    fn telling(&self) -> Option<&dyn Advice> {
        let advice = |error: &'_ AttemptError| -> Option<Disposition> {
            match error {
                AttemptError::Connect(error) => Some(error.disposition()),
                AttemptError::Session(error) => Some(error.disposition()),
                AttemptError::Unwanted { .. } | AttemptError::NoHost => None,
            }
        };
        let operator = self.attempts.iter().find(|(_, error)| advice(error) == Some(Disposition::Operator));
        let any = operator.or_else(|| self.attempts.iter().find(|(_, error)| advice(error).is_some()));
        match &any?.1 {
            AttemptError::Connect(error) => Some(error),
            AttemptError::Session(error) => Some(error),
            AttemptError::Unwanted { .. } | AttemptError::NoHost => None,
        }
    }
}

impl Advice for NoServer {
    fn hint(&self) -> Option<String> {
        match self.telling() {
            Some(error) => error.hint(),
            None => Some("is the server being switched over, or does `postgres` name the wrong hosts?".into()),
        }
    }

    fn disposition(&self) -> Disposition {
        self.telling().map_or(Disposition::Reconnect, Advice::disposition)
    }

    fn exit_code(&self) -> ExitCode {
        self.telling().map_or(ExitCode::Unavailable, Advice::exit_code)
    }
}

/// Connects to the first host that answers and is of the wanted kind.
pub async fn connect(dialer: &dyn Dial, logins: &[Login], wanted: TargetSessionAttrs) -> Result<Connected, NoServer> {
    // Two rounds for `prefer-standby`: a standby first, then anybody.
    let rounds: &[TargetSessionAttrs] = match wanted {
        TargetSessionAttrs::PreferStandby => &[TargetSessionAttrs::Standby, TargetSessionAttrs::Any],
        _ => &[wanted],
    };
    let mut attempts = Vec::new();
    for &wanted in rounds {
        for login in logins {
            match attempt(dialer, login, wanted).await {
                Ok(connected) => return Ok(connected),
                Err(error) => attempts.push((host_of(login), error)),
            }
        }
    }
    if attempts.is_empty() {
        attempts.push((String::new(), AttemptError::NoHost));
    }
    Err(NoServer { attempts })
}

/// `connect`, with the error ready for a person.
pub async fn connect_or_explain(
    dialer: &dyn Dial,
    logins: &[Login],
    wanted: TargetSessionAttrs,
) -> Result<Connected, Failure> {
    Ok(connect(dialer, logins, wanted).await?)
}

fn host_of(login: &Login) -> String {
    match &login.address {
        Address::Tcp { host, port, .. } => format!("{host}:{port}"),
        Address::Unix { directory, port } => format!("{}:{port}", directory.display()),
    }
}

async fn attempt(dialer: &dyn Dial, login: &Login, wanted: TargetSessionAttrs) -> Result<Connected, AttemptError> {
    let mut connection = Connection::open(dialer, login).await?;
    let in_recovery = match connection.in_hot_standby() {
        Some(standby) => standby,
        // Before 14 the server does not say; a server in recovery is read-only.
        None => connection.show("transaction_read_only").await? == "on",
    };
    // A primary with default_transaction_read_only=on takes no writes either.
    let read_only = in_recovery || connection.parameter("default_transaction_read_only") == Some("on");
    let (found, fits) = match wanted {
        TargetSessionAttrs::Any | TargetSessionAttrs::PreferStandby => ("", true),
        TargetSessionAttrs::ReadWrite => ("read-only", !read_only),
        TargetSessionAttrs::ReadOnly => ("writable", read_only),
        TargetSessionAttrs::Primary => ("a standby", !in_recovery),
        TargetSessionAttrs::Standby => ("a primary", in_recovery),
    };
    if fits {
        return Ok(Connected { connection, login: login.clone(), in_recovery });
    }
    connection.close().await;
    Err(AttemptError::Unwanted { found, wanted: wanted_name(wanted) })
}

fn wanted_name(wanted: TargetSessionAttrs) -> &'static str {
    match wanted {
        TargetSessionAttrs::Any => "any",
        TargetSessionAttrs::ReadWrite => "read-write",
        TargetSessionAttrs::ReadOnly => "read-only",
        TargetSessionAttrs::Primary => "primary",
        TargetSessionAttrs::Standby => "standby",
        TargetSessionAttrs::PreferStandby => "prefer-standby",
    }
}
