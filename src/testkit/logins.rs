//! Owns: logins for the model server, which asks for nothing.

use std::time::Duration;

use crate::agent::world::LoginSource;
use crate::error::Failure;
use crate::postgres::{Purpose, TargetSessionAttrs};
use crate::replication::{Address, Login, Security, SessionKind, SslMode};

/// One host, no password.
#[derive(Clone, Copy, Debug)]
pub struct ModelLogins;

impl LoginSource for ModelLogins {
    fn logins(&self, purpose: Purpose) -> Result<Vec<Login>, Failure> {
        let kind = match purpose {
            Purpose::Physical => SessionKind::Physical,
            Purpose::Sql => SessionKind::Sql { database: "postgres".into() },
        };
        Ok(vec![Login {
            address: Address::Tcp { host: "model".into(), ip: None, port: 5432 },
            ssl_mode: SslMode::Disable,
            security: Security::default(),
            user: "seawall".into(),
            password: None,
            kind,
            application_name: "seawall".into(),
            options: String::new(),
            connect_timeout: Duration::from_secs(10),
            answer_timeout: Duration::from_secs(30),
            keepalive: None,
            tcp_user_timeout: None,
        }])
    }

    fn wanted(&self) -> TargetSessionAttrs {
        TargetSessionAttrs::Any
    }
}
