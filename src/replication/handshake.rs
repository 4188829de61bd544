//! Owns: start-up and authentication as a state machine: messages in, bytes to send out; what the login demands of the
//! way the server lets it in (`channel_binding`, `require_auth`, `sslcertmode`).
//! Does not own: TLS, sockets, time. The nonce of SCRAM is the only randomness. proto-notes/01-startup.md.

use std::collections::BTreeMap;
use std::fmt;

use bytes::BytesMut;
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{self, SCRAM_SHA_256, SCRAM_SHA_256_PLUS, ScramSha256};
use postgres_protocol::message::frontend;

use super::error::{ConnectError, Peer, Phase, ServerError, escape};
use super::framing::{Fields, ProtocolError};
use super::security::{AuthMethod, CertMode, ChannelBinding};
use super::tls::TlsFacts;
use super::{Login, SessionKind};

/// The server refuses longer start-up packets.
const STARTUP_BYTES_MAX: usize = 10_000;

/// `postgres-protocol` refuses more, and says so in words nobody would understand.
const SCRAM_ITERATIONS_MAX: u64 = 100_000;

/// What the server reports about itself; bounded, whatever it sends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parameters(BTreeMap<String, String>);

impl Parameters {
    const COUNT_MAX: usize = 200;

    /// Takes the body of a ParameterStatus.
    pub fn update(&mut self, body: &[u8]) -> Result<(), ProtocolError> {
        let mut fields = Fields(body);
        let (Some(name), Some(value)) = (fields.c_string(), fields.c_string()) else {
            return Err(ProtocolError::Malformed { tag: b'S', cause: "it ends early" });
        };
        let text = |bytes| escape(&String::from_utf8_lossy(bytes));
        let name = text(name);
        if self.0.len() < Self::COUNT_MAX || self.0.contains_key(&name) {
            self.0.insert(name, text(value));
        }
        Ok(())
    }

    pub fn value(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }
}

/// The start-up packet: protocol 3.0, which every version speaks and replication needs no more than.
pub fn startup_packet(login: &Login) -> Result<Vec<u8>, ConnectError> {
    let mut parameters = vec![
        ("user", login.user.as_str()),
        ("application_name", login.application_name.as_str()),
        ("client_encoding", "UTF8"),
    ];
    match &login.kind {
        // No database: `ALTER ROLE … SET` does not apply to a physical walsender either.
        SessionKind::Physical => parameters.push(("replication", "true")),
        SessionKind::Sql { database } => parameters.push(("database", database)),
    }
    if !login.options.is_empty() {
        parameters.push(("options", &login.options));
    }
    let bad = |cause| ConnectError::Login { target: Peer::of(login).target, cause };
    let mut packet = BytesMut::new();
    frontend::startup_message(parameters, &mut packet)
        .map_err(|_| bad("user, database, application name or options hold a zero byte"))?;
    if packet.len() > STARTUP_BYTES_MAX {
        return Err(bad("user, database, application name and options are longer than the server takes"));
    }
    Ok(packet.to_vec())
}

/// What the shell does next.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Read the next message.
    Continue,
    Send(Vec<u8>),
    /// ReadyForQuery: the session is open.
    Done,
}

/// ```text
/// Start ──► Scram ──► ScramProof ──► Proven ─┐
///   │  └──► Password ────────────────────────┼──► Accepted ──► Done
///   └────────────────────────────────────────┘
/// ```
enum State {
    Start,
    /// A password in clear or by MD5 was sent.
    Password,
    /// Our first SCRAM message was sent.
    Scram(ScramSha256),
    /// Our proof was sent; the server owes us its own.
    ScramProof(ScramSha256),
    /// The server proved that it knows the password.
    Proven,
    /// AuthenticationOk.
    Accepted,
}

/// The client's half of opening a session.
pub struct Handshake<'a> {
    login: &'a Login,
    /// What the TLS handshake under us found out.
    tls: Option<&'a TlsFacts>,
    state: State,
    /// SCRAM was bound to the server's certificate.
    is_bound: bool,
    pub parameters: Parameters,
}

impl fmt::Debug for Handshake<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handshake").field("parameters", &self.parameters).finish_non_exhaustive()
    }
}

impl<'a> Handshake<'a> {
    /// For after the start-up packet was sent.
    pub fn new(login: &'a Login, tls: Option<&'a TlsFacts>) -> Handshake<'a> {
        Handshake { login, tls, state: State::Start, is_bound: false, parameters: Parameters::default() }
    }

    /// Takes one message from the server.
    pub fn handle(&mut self, tag: u8, body: &[u8]) -> Result<Step, ConnectError> {
        match (tag, &self.state) {
            (b'E', _) => {
                let error = ServerError::decode(body, Phase::Connect);
                Err(ConnectError::Server { peer: Peer::of(self.login).into(), error: error.into() })
            }
            // 19 warns after an MD5 login; NegotiateProtocolVersion may come from a pooler: 3.0 is what we speak.
            (b'N' | b'v', _) => Ok(Step::Continue),
            (b'R', State::Accepted) => Err(self.unexpected(tag)),
            (b'R', _) => self.authenticate(body),
            (b'S', State::Accepted) => {
                self.parameters.update(body).map_err(|error| self.protocol(error))?;
                Ok(Step::Continue)
            }
            // The key to cancel a query with, of any length: never used.
            (b'K', State::Accepted) => Ok(Step::Continue),
            (b'Z', State::Accepted) => Ok(Step::Done),
            _ => Err(self.unexpected(tag)),
        }
    }

    fn authenticate(&mut self, body: &[u8]) -> Result<Step, ConnectError> {
        let mut fields = Fields(body);
        let code = fields.i32().ok_or_else(|| self.malformed("it ends early"))?;
        let data = fields.0;
        self.check_demands(code)?;
        match (code, std::mem::replace(&mut self.state, State::Start)) {
            // Not from Scram or ScramProof: a server that skips its own proof does not know the password.
            (0, State::Start | State::Password | State::Proven) => {
                self.state = State::Accepted;
                Ok(Step::Continue)
            }
            (3, State::Start) => self.send_password(|password, _| password.as_bytes().to_vec()),
            (5, State::Start) => {
                let salt: [u8; 4] = data.try_into().map_err(|_| self.malformed("the MD5 salt is not 4 bytes"))?;
                self.send_password(|password, user| md5_hash(user.as_bytes(), password.as_bytes(), salt).into_bytes())
            }
            (10, State::Start) => self.begin_scram(data),
            (11, State::Scram(scram)) => self.prove(scram, data),
            (12, State::ScramProof(mut scram)) => {
                scram.finish(data).map_err(|error| self.scram(&error))?;
                self.state = State::Proven;
                Ok(Step::Continue)
            }
            (code, State::Start) => Err(self.unsupported(code)),
            _ => Err(self.unexpected(b'R')),
        }
    }

    fn send_password(&mut self, encode: impl Fn(&str, &str) -> Vec<u8>) -> Result<Step, ConnectError> {
        let encoded = encode(self.password()?, &self.login.user);
        let mut message = BytesMut::new();
        frontend::password_message(&encoded, &mut message).map_err(|_| self.bad_password())?;
        self.state = State::Password;
        Ok(Step::Send(message.to_vec()))
    }

    fn begin_scram(&mut self, mechanisms: &[u8]) -> Result<Step, ConnectError> {
        let offered: Vec<&[u8]> = mechanisms.split(|&byte| byte == 0).filter(|name| !name.is_empty()).collect();
        let (mechanism, binding) = self.mechanism(&offered)?;
        let scram = ScramSha256::new(self.password()?.as_bytes(), binding);
        let mut message = BytesMut::new();
        frontend::sasl_initial_response(mechanism, scram.message(), &mut message)
            .map_err(|error| self.scram(&error))?;
        self.is_bound = mechanism == SCRAM_SHA_256_PLUS;
        self.state = State::Scram(scram);
        Ok(Step::Send(message.to_vec()))
    }

    /// Which mechanism, and what its first letter says: `p` bound, `y` "we could, you did not offer it" (a server that
    /// did offer it then knows that somebody took the offer away), `n` we cannot or may not.
    fn mechanism(&self, offered: &[&[u8]]) -> Result<(&'static str, sasl::ChannelBinding), ConnectError> {
        let wanted = self.login.security.channel_binding;
        let offers = |name: &str| offered.contains(&name.as_bytes());
        match self.tls {
            None if wanted == ChannelBinding::Require => Err(self.policy(
                "channel_binding is `require`, and the connection has no TLS",
                "use sslmode=require or stronger, and a hostssl line in pg_hba.conf.",
            )),
            None if offers(SCRAM_SHA_256_PLUS) => Err(self.policy(
                "the server offers SCRAM-SHA-256-PLUS on a connection without TLS",
                "something between this machine and the server ends TLS: connect to the server itself.",
            )),
            Some(tls) if offers(SCRAM_SHA_256_PLUS) && wanted != ChannelBinding::Disable => {
                let end_point = tls.end_point.clone().map_err(|cause| {
                    self.policy(
                        format!("the server's certificate cannot be bound to: {cause}"),
                        "issue it a certificate signed by RSA or ECDSA, or use channel_binding=disable.",
                    )
                })?;
                Ok((SCRAM_SHA_256_PLUS, sasl::ChannelBinding::tls_server_end_point(end_point)))
            }
            _ if !offers(SCRAM_SHA_256) => {
                let names: Vec<_> = offered.iter().map(|name| escape(&String::from_utf8_lossy(name))).collect();
                Err(self.method(&format!("SASL ({})", names.join(", "))))
            }
            _ if wanted == ChannelBinding::Require => Err(self.policy(
                "channel_binding is `require`, and the server offers SCRAM without it",
                "is something between this machine and the server that ends TLS?",
            )),
            Some(_) if wanted != ChannelBinding::Disable => Ok((SCRAM_SHA_256, sasl::ChannelBinding::unrequested())),
            _ => Ok((SCRAM_SHA_256, sasl::ChannelBinding::unsupported())),
        }
    }

    /// Before anything is answered: what the login demands, as libpq's `check_expected_areq`.
    fn check_demands(&self, code: i32) -> Result<(), ConnectError> {
        const ACCEPTED: i32 = 0;
        let security = &self.login.security;
        if code == ACCEPTED
            && security.cert_mode == CertMode::Require
            && !self.tls.is_some_and(|tls| tls.certificate_sent)
        {
            let cause = match self.tls {
                None => "sslcertmode is `require`, and the connection has no TLS",
                Some(tls) if !tls.certificate_requested => {
                    "sslcertmode is `require`, and the server did not ask for a certificate"
                }
                Some(_) => "sslcertmode is `require`, and there was no certificate to send",
            };
            return Err(self.policy(cause, "does the server have ssl_ca_file, and are sslcert and sslkey right?"));
        }
        if let Some(policy) = &security.require_auth {
            let is_finished = matches!(self.state, State::Password | State::Proven);
            let asked = match code {
                ACCEPTED => AuthMethod::None,
                3 => AuthMethod::Password,
                5 => AuthMethod::Md5,
                7 | 8 => AuthMethod::Gss,
                9 => AuthMethod::Sspi,
                _ => AuthMethod::Scram,
            };
            // What was asked for was checked when it was asked for; here it is whether anything was.
            let is_done = code == ACCEPTED && is_finished;
            if !is_done && !policy.allows(asked) {
                let cause = match asked {
                    AuthMethod::None => format!("require_auth is `{policy}`, and the server let us in without it"),
                    other => format!("require_auth is `{policy}`, and the server asks for {}", other.name()),
                };
                return Err(
                    self.policy(cause, "change the method of this user's line in pg_hba.conf, or require_auth.")
                );
            }
        }
        let is_sasl = (10..=12).contains(&code);
        if security.channel_binding == ChannelBinding::Require && !is_sasl && !(code == ACCEPTED && self.is_bound) {
            return Err(self.policy(
                "channel_binding is `require`, and the server lets us in without it",
                "use scram-sha-256 on a hostssl line for this user in pg_hba.conf (and a SCRAM password).",
            ));
        }
        Ok(())
    }

    fn prove(&mut self, mut scram: ScramSha256, challenge: &[u8]) -> Result<Step, ConnectError> {
        if let Some(count) = scram_iterations(challenge).filter(|&count| count > SCRAM_ITERATIONS_MAX) {
            return Err(ConnectError::ScramIterations { target: self.target(), count });
        }
        scram.update(challenge).map_err(|error| self.scram(&error))?;
        let mut message = BytesMut::new();
        frontend::sasl_response(scram.message(), &mut message).map_err(|error| self.scram(&error))?;
        self.state = State::ScramProof(scram);
        Ok(Step::Send(message.to_vec()))
    }

    fn password(&self) -> Result<&'a str, ConnectError> {
        match &self.login.password {
            Some(password) => Ok(password.expose()),
            None => Err(ConnectError::PasswordMissing { target: self.target(), user: escape(&self.login.user) }),
        }
    }

    fn target(&self) -> String {
        Peer::of(self.login).target
    }

    fn unsupported(&self, code: i32) -> ConnectError {
        self.method(match code {
            2 => "Kerberos 5",
            7 | 8 => "GSSAPI",
            9 => "SSPI",
            _ => return self.method(&format!("number {code}")),
        })
    }

    fn policy(&self, cause: impl Into<String>, hint: &'static str) -> ConnectError {
        ConnectError::Policy { target: self.target(), cause: cause.into(), hint }
    }

    fn method(&self, method: &str) -> ConnectError {
        ConnectError::Method { target: self.target(), method: method.to_string() }
    }

    fn bad_password(&self) -> ConnectError {
        ConnectError::Login { target: self.target(), cause: "the password holds a zero byte" }
    }

    /// The library's errors quote the server's message at most, never the password.
    fn scram(&self, error: &std::io::Error) -> ConnectError {
        ConnectError::Scram { target: self.target(), cause: escape(&error.to_string()) }
    }

    fn protocol(&self, error: ProtocolError) -> ConnectError {
        ConnectError::Protocol { target: self.target(), error }
    }

    fn malformed(&self, cause: &'static str) -> ConnectError {
        self.protocol(ProtocolError::Malformed { tag: b'R', cause })
    }

    fn unexpected(&self, tag: u8) -> ConnectError {
        self.protocol(ProtocolError::Unexpected { tag, during: "connecting" })
    }
}

/// `i=` of the server's first SCRAM message.
fn scram_iterations(challenge: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(challenge).ok()?;
    let digits = text.split(',').find_map(|part| part.strip_prefix("i="))?;
    // More digits than a u64 holds are too many iterations as well.
    digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::Duration;

    use super::*;
    use crate::replication::security::{AuthPolicy, Security};
    use crate::replication::{Address, SslMode};
    use crate::secret::Secret;

    fn login() -> Login {
        Login {
            address: Address::Unix { directory: PathBuf::from("/run/pg"), port: 5432 },
            ssl_mode: SslMode::Disable,
            security: Security::default(),
            user: "archiver".into(),
            password: Some(Secret::new("geheim")),
            kind: SessionKind::Physical,
            application_name: "seawall".into(),
            options: "-c a=3s".into(),
            connect_timeout: Duration::from_secs(1),
            answer_timeout: Duration::from_secs(1),
            keepalive: None,
            tcp_user_timeout: None,
        }
    }

    fn request(code: i32, data: &[u8]) -> Vec<u8> {
        [&code.to_be_bytes()[..], data].concat()
    }

    #[test]
    fn the_startup_packet_asks_for_a_physical_walsender() {
        let packet = startup_packet(&login()).unwrap();
        let text = String::from_utf8_lossy(&packet[8..]).replace('\0', "|");
        assert_eq!(&packet[4..8], &[0, 3, 0, 0]);
        assert_eq!(
            text,
            "user|archiver|application_name|seawall|client_encoding|UTF8|replication|true|options|-c a=3s||"
        );
        let sql = Login { kind: SessionKind::Sql { database: "app".into() }, ..login() };
        assert!(String::from_utf8_lossy(&startup_packet(&sql).unwrap()).contains("database\0app\0"));
    }

    #[test]
    fn values_the_server_would_not_take_are_refused_here() {
        let zero = Login { user: "a\0b".into(), ..login() };
        assert!(matches!(startup_packet(&zero), Err(ConnectError::Login { .. })));
        let long = Login { options: "x".repeat(10_000), ..login() };
        assert!(matches!(startup_packet(&long), Err(ConnectError::Login { .. })));
    }

    #[test]
    fn trust_and_what_follows_it() {
        let login = login();
        let mut handshake = Handshake::new(&login, None);
        assert_eq!(handshake.handle(b'R', &request(0, b"")), Ok(Step::Continue));
        assert_eq!(handshake.handle(b'S', b"server_version\x0015.20 (Debian)\0"), Ok(Step::Continue));
        assert_eq!(handshake.handle(b'v', &[0; 8]), Ok(Step::Continue));
        assert_eq!(handshake.handle(b'K', &[0; 36]), Ok(Step::Continue));
        assert_eq!(handshake.handle(b'N', b"\0"), Ok(Step::Continue));
        assert_eq!(handshake.handle(b'Z', b"I"), Ok(Step::Done));
        assert_eq!(handshake.parameters.value("server_version"), Some("15.20 (Debian)"));
    }

    #[test]
    fn a_server_that_skips_its_own_proof_is_refused() {
        let login = login();
        let mut handshake = Handshake::new(&login, None);
        assert!(matches!(handshake.handle(b'R', &request(10, b"SCRAM-SHA-256\0\0")), Ok(Step::Send(_))));
        let early = handshake.handle(b'R', &request(0, b""));
        assert!(matches!(early, Err(ConnectError::Protocol { .. })), "{early:?}");
    }

    #[test]
    fn what_is_not_built_is_named() {
        let login = login();
        for (code, data, name) in
            [(7, &b""[..], "GSSAPI"), (9, b"", "SSPI"), (77, b"", "number 77"), (10, b"OAUTHBEARER\0\0", "OAUTHBEARER")]
        {
            let error = Handshake::new(&login, None).handle(b'R', &request(code, data)).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
        }
        let mut handshake = Handshake::new(&login, None);
        handshake.handle(b'R', &request(10, b"SCRAM-SHA-256\0\0")).unwrap();
        let error = handshake.handle(b'R', &request(11, b"r=x,s=AA==,i=100001")).unwrap_err();
        assert!(error.to_string().contains("100001 SCRAM iterations"), "{error}");
    }

    #[test]
    fn no_error_or_debug_output_holds_the_password() {
        let login = login();
        let mut handshake = Handshake::new(&login, None);
        handshake.handle(b'R', &request(10, b"SCRAM-SHA-256\0\0")).unwrap();
        let error = handshake.handle(b'R', &request(11, b"r=geheim?,s=AA==,i=1")).unwrap_err();
        assert!(matches!(error, ConnectError::Scram { .. }));
        assert!(!format!("{error:?} {error} {handshake:?} {login:?}").contains("geheim\""));
        let missing = Login { password: None, ..login };
        let error = Handshake::new(&missing, None).handle(b'R', &request(3, b"")).unwrap_err();
        assert!(matches!(error, ConnectError::PasswordMissing { .. }));
    }

    const PLUS: &[u8] = b"SCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0";
    const NO_PLUS: &[u8] = b"SCRAM-SHA-256\0\0";

    fn tls() -> TlsFacts {
        TlsFacts {
            version: "TLSv1.3",
            verified: "not verified",
            end_point: Ok(vec![7; 32]),
            certificate_requested: true,
            certificate_sent: false,
        }
    }

    fn demanding(channel_binding: ChannelBinding) -> Login {
        Login { security: Security { channel_binding, ..Security::default() }, ..login() }
    }

    /// The mechanism and the gs2 header of our first message.
    fn first_message(login: &Login, tls: Option<&TlsFacts>, offered: &[u8]) -> Result<String, ConnectError> {
        let step = Handshake::new(login, tls).handle(b'R', &request(10, offered))?;
        let Step::Send(message) = step else { panic!("{step:?}") };
        let text = String::from_utf8_lossy(&message[5..]).replace('\0', "|");
        Ok(text.split("n=,r=").next().unwrap().replace(|c: char| c.is_control() || c == '\u{fffd}', ""))
    }

    #[test]
    fn the_gs2_flag_says_what_we_could_and_what_we_saw() {
        let facts = tls();
        let message = |wanted, tls, offered| first_message(&demanding(wanted), tls, offered).unwrap();
        let begins = |text: String, mechanism: &str, flag: &str| {
            assert!(text.starts_with(&format!("{mechanism}|")) && text.contains(flag), "{text}");
        };
        use ChannelBinding::{Disable, Prefer, Require};
        begins(message(Prefer, Some(&facts), PLUS), "SCRAM-SHA-256-PLUS", "p=tls-server-end-point,,");
        begins(message(Require, Some(&facts), PLUS), "SCRAM-SHA-256-PLUS", "p=tls-server-end-point,,");
        begins(message(Prefer, Some(&facts), NO_PLUS), "SCRAM-SHA-256", "y,,");
        begins(message(Disable, Some(&facts), PLUS), "SCRAM-SHA-256", "n,,");
        begins(message(Prefer, None, NO_PLUS), "SCRAM-SHA-256", "n,,");
    }

    #[test]
    fn required_binding_fails_on_everything_else_before_a_password_is_sent() {
        let login = demanding(ChannelBinding::Require);
        let facts = tls();
        let over = |tls, code, data: &[u8]| Handshake::new(&login, tls).handle(b'R', &request(code, data)).unwrap_err();
        for (code, data) in [(0, &b""[..]), (3, b""), (5, b"salt"), (7, b""), (9, b""), (10, NO_PLUS)] {
            let error = over(Some(&facts), code, data);
            assert!(matches!(error, ConnectError::Policy { .. }), "{code}: {error}");
        }
        assert!(matches!(over(None, 10, NO_PLUS), ConnectError::Policy { .. }));
        let unhashed = TlsFacts { end_point: Err("no hash".into()), ..tls() };
        assert!(over(Some(&unhashed), 10, PLUS).to_string().contains("no hash"));
    }

    #[test]
    fn an_offer_that_cannot_be_meant_is_refused() {
        let error = first_message(&login(), None, PLUS).unwrap_err();
        assert!(matches!(error, ConnectError::Policy { .. }), "{error}");
        // Not quietly without binding: a server that offers it would take us for somebody in between.
        let unhashed = TlsFacts { end_point: Err("Ed25519".into()), ..tls() };
        assert!(first_message(&login(), Some(&unhashed), PLUS).is_err());
        assert!(first_message(&demanding(ChannelBinding::Disable), Some(&unhashed), PLUS).is_ok());
    }

    #[test]
    fn require_auth_is_checked_at_every_request() {
        let demanding = |text: &str| {
            let require_auth = Some(AuthPolicy::parse(text).unwrap());
            Login { security: Security { require_auth, ..Security::default() }, ..login() }
        };
        let first = |text: &str, code, data: &[u8]| {
            Handshake::new(&demanding(text), None).handle(b'R', &request(code, data)).map(drop)
        };
        assert!(first("scram-sha-256", 10, NO_PLUS).is_ok());
        assert!(first("scram-sha-256", 3, b"").is_err());
        assert!(first("scram-sha-256", 5, b"salt").is_err());
        assert!(first("scram-sha-256", 0, b"").is_err());
        assert!(first("none", 0, b"").is_ok());
        assert!(first("!password", 0, b"").is_ok());
        assert!(first("!password", 3, b"").is_err());
        assert!(first("!none", 0, b"").is_err());
        let login = demanding("password");
        let mut handshake = Handshake::new(&login, None);
        handshake.handle(b'R', &request(3, b"")).unwrap();
        assert_eq!(handshake.handle(b'R', &request(0, b"")), Ok(Step::Continue));
    }

    #[test]
    fn a_required_certificate_must_have_been_sent() {
        let security = Security { cert_mode: CertMode::Require, ..Security::default() };
        let login = Login { security, ..login() };
        let accepted = |tls: Option<&TlsFacts>| Handshake::new(&login, tls).handle(b'R', &request(0, b""));
        assert!(accepted(None).is_err() && accepted(Some(&tls())).is_err());
        assert!(accepted(Some(&TlsFacts { certificate_sent: true, ..tls() })).is_ok());
    }

    #[test]
    fn nonsense_is_refused_without_a_panic() {
        let login = login();
        for tag in 0..=255u8 {
            for body in
                [&b""[..], b"\0", b"\0\0\0\0", b"\0\0\0\x05ab", b"\xff\xff\xff\xff", b"\0\0\0\x0b", b"\0\0\0\x0c"]
            {
                let _ = Handshake::new(&login, None).handle(tag, body);
            }
        }
    }

    #[test]
    fn parameters_are_bounded() {
        let mut parameters = Parameters::default();
        for i in 0..10_000 {
            parameters.update(format!("p{i}\0v\0").as_bytes()).unwrap();
        }
        assert_eq!(parameters.0.len(), Parameters::COUNT_MAX);
        assert!(parameters.update(b"no end").is_err());
    }
}
