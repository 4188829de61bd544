//! Owns: from the settings to the logins to try, in order.
//! Does not own: the spelling of connection strings (`syntax`), precedence (`settings`), opening sessions
//! (`replication`).

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::environment::Environment;
use super::error::ConninfoError;
use super::passfile::{Passfile, Wanted};
use super::security;
use super::settings::Settings;
use crate::replication::{Address, Login, Security, SessionKind, SslMode};
use crate::secret::Secret;

/// Debian's libpq looks for the socket here.
const SOCKET_DIRECTORY: &str = "/var/run/postgresql";
const PORT: u16 = 5432;
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// libpq's `target_session_attrs`: which of the hosts is the right one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TargetSessionAttrs {
    #[default]
    Any,
    ReadWrite,
    ReadOnly,
    Primary,
    Standby,
    PreferStandby,
}

/// What a session is wanted for; the connection string knows the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A physical walsender.
    Physical,
    /// SQL on [`Conninfo::database`].
    Sql,
}

/// One login per host, in the order to try them, and what an operator should be told.
#[derive(Clone, Debug)]
pub struct Logins {
    pub logins: Vec<Login>,
    pub warnings: Vec<String>,
}

/// A connection string, understood. `Debug` and `Display` show hosts, user and database, never a password.
#[derive(Clone)]
pub struct Conninfo {
    /// What the string itself said, without the password.
    written: Vec<(&'static str, String)>,
    hosts: Vec<Host>,
    user: String,
    database: Option<String>,
    /// From the connection string or the service. Empty means: do not ask `PGPASSWORD`.
    password: Option<Secret>,
    password_in_string: bool,
    password_file: Option<PathBuf>,
    passfile: Option<PathBuf>,
    ssl_mode: SslMode,
    security: Security,
    application_name: String,
    options: String,
    connect_timeout: Duration,
    target_session_attrs: TargetSessionAttrs,
    keepalive: Option<(Duration, Duration, u32)>,
    tcp_user_timeout: Option<Duration>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Host {
    address: Address,
    /// What the password file calls it.
    passfile_name: String,
}

impl Conninfo {
    /// Reads a keyword string or URI; service and environment fill in what it leaves out.
    pub fn parse(text: &str, environment: &dyn Environment) -> Result<Conninfo, ConninfoError> {
        let settings = Settings::gather(text, environment)?;
        settings.refuse_unavailable()?;
        let application_name = settings.application_name()?;
        let (ssl_mode, security) = security::read(&settings, environment)?;
        Ok(Conninfo {
            written: settings.written(),
            hosts: hosts(&settings, ssl_mode, environment)?,
            user: user(&settings, environment)?,
            database: settings.filled("dbname").map(str::to_string),
            password: settings.get("password").map(|setting| Secret::new(setting.value.as_str())),
            password_in_string: settings.is_written("password"),
            password_file: None,
            passfile: settings.filled("passfile").map(PathBuf::from),
            ssl_mode,
            security,
            application_name,
            options: settings.filled("options").unwrap_or_default().to_string(),
            connect_timeout: settings.connect_timeout()?,
            target_session_attrs: settings.target_session_attrs()?,
            keepalive: settings.keepalive()?,
            tcp_user_timeout: settings.tcp_user_timeout()?,
        })
    }

    /// The password is this file's content (without one line end at its end), read at every login.
    /// Goes before a service's password, `PGPASSWORD` and the password file of libpq.
    pub fn with_password_file(mut self, path: impl Into<PathBuf>) -> Conninfo {
        self.password_file = Some(path.into());
        self
    }

    /// One login per host, with the passwords valid now: files and variables are read anew on every call.
    pub fn logins(&self, purpose: Purpose, environment: &dyn Environment) -> Result<Logins, ConninfoError> {
        let mut warnings = Vec::new();
        let passwords = self.passwords(purpose, environment, &mut warnings)?;
        let kind = match purpose {
            Purpose::Physical => SessionKind::Physical,
            Purpose::Sql => SessionKind::Sql { database: self.database().to_string() },
        };
        let hosts = self.hosts.iter().zip(passwords);
        let logins = hosts.map(|(host, password)| self.login(host, password, kind.clone())).collect();
        Ok(Logins { logins, warnings })
    }

    fn login(&self, host: &Host, password: Option<Secret>, kind: SessionKind) -> Login {
        let unix = matches!(host.address, Address::Unix { .. });
        Login {
            address: host.address.clone(),
            // PostgreSQL never speaks TLS on a Unix socket, whatever sslmode says.
            ssl_mode: if unix { SslMode::Disable } else { self.ssl_mode },
            security: self.security.clone(),
            user: self.user.clone(),
            password,
            kind,
            application_name: self.application_name.clone(),
            options: self.options.clone(),
            connect_timeout: self.connect_timeout,
            answer_timeout: ANSWER_TIMEOUT,
            keepalive: self.keepalive.filter(|_| !unix),
            tcp_user_timeout: self.tcp_user_timeout.filter(|_| !unix),
        }
    }

    /// One per host.
    fn passwords(
        &self,
        purpose: Purpose,
        environment: &dyn Environment,
        warnings: &mut Vec<String>,
    ) -> Result<Vec<Option<Secret>>, ConninfoError> {
        if let Some(path) = &self.password_file {
            let password = read_password_file(path, environment, warnings)?;
            return Ok(vec![Some(password); self.hosts.len()]);
        }
        let variable = || environment.var("PGPASSWORD").map(Secret::new);
        let given = self.password.clone().or_else(variable).filter(|secret| !secret.expose().is_empty());
        if given.is_some() {
            return Ok(vec![given; self.hosts.len()]);
        }
        let default = || environment.home().map(|home| home.join(".pgpass"));
        let Some(path) = self.passfile.clone().or_else(default) else { return Ok(vec![None; self.hosts.len()]) };
        let passfile = Passfile::read(&path, environment, warnings);
        let databases = self.passfile_databases(purpose);
        let find = |host: &Host| databases.iter().find_map(|database| passfile.find(&self.wanted(host, database)));
        Ok(self.hosts.iter().map(find).collect())
    }

    /// The names to look up in the password file, best first. Physical sessions have no database: like
    /// `pg_receivewal` we look for a dbname the string gives, else for `replication`; the latter also when a dbname
    /// that is only meant for SQL has no line.
    fn passfile_databases(&self, purpose: Purpose) -> Vec<&str> {
        let written = self.written.iter().any(|(keyword, value)| *keyword == "dbname" && !value.is_empty());
        match purpose {
            Purpose::Sql => vec![self.database()],
            Purpose::Physical if written => vec![self.database(), "replication"],
            Purpose::Physical => vec!["replication"],
        }
    }

    fn wanted<'a>(&'a self, host: &'a Host, database: &'a str) -> Wanted<'a> {
        let (Address::Tcp { port, .. } | Address::Unix { port, .. }) = host.address;
        Wanted { host: &host.passfile_name, port, database, user: &self.user }
    }

    pub fn target_session_attrs(&self) -> TargetSessionAttrs {
        self.target_session_attrs
    }

    pub fn application_name(&self) -> &str {
        &self.application_name
    }

    pub fn user(&self) -> &str {
        &self.user
    }

    /// The database for SQL: `dbname`, else `postgres`.
    pub fn database(&self) -> &str {
        self.database.as_deref().unwrap_or("postgres")
    }

    /// True when the connection string itself holds a password.
    pub fn password_in_string(&self) -> bool {
        self.password_in_string
    }

    /// The hosts for messages: `db1:5432, [::1]:5433, /var/run/postgresql:5432`.
    pub fn hosts_summary(&self) -> String {
        let names: Vec<String> = self.hosts.iter().map(|host| summary(&host.address)).collect();
        names.join(", ")
    }

    /// Hosts, user and database, for logs.
    pub fn redacted(&self) -> String {
        format!("hosts {} user {} dbname {}", self.hosts_summary(), self.user, self.database())
    }

    /// What was written, as a keyword string, without the password: for showing and for writing a configuration.
    pub fn to_keywords(&self) -> String {
        let words: Vec<String> =
            self.written.iter().map(|(keyword, value)| format!("{keyword}={}", quote(value))).collect();
        words.join(" ")
    }
}

impl fmt::Display for Conninfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.redacted())
    }
}

impl fmt::Debug for Conninfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Conninfo({})", self.redacted())
    }
}

fn summary(address: &Address) -> String {
    match address {
        Address::Unix { directory, port } => format!("{}:{port}", directory.display()),
        Address::Tcp { host, port, .. } if host.contains(':') => format!("[{host}]:{port}"),
        Address::Tcp { host, port, .. } => format!("{host}:{port}"),
    }
}

fn quote(value: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./,:@%+*".contains(c);
    if !value.is_empty() && value.chars().all(plain) {
        return value.to_string();
    }
    format!("'{}'", value.replace('\\', r"\\").replace('\'', r"\'"))
}

fn read_password_file(
    path: &Path,
    environment: &dyn Environment,
    warnings: &mut Vec<String>,
) -> Result<Secret, ConninfoError> {
    let failed = |cause: String, permission| ConninfoError::ReadFile {
        what: "password file",
        path: path.to_path_buf(),
        cause,
        permission,
    };
    let denied = std::io::ErrorKind::PermissionDenied;
    let content = environment.read(path).map_err(|error| failed(error.to_string(), error.kind() == denied))?;
    // A group may read it: orchestrators mount secrets that way.
    if content.mode & 0o027 != 0 {
        let mode = content.mode;
        warnings.push(format!("{} is open to others (mode {mode:04o}); chmod 0600 would close it", path.display()));
    }
    let text = content.text().map_err(|_| failed("not UTF-8".to_string(), false))?;
    let text = text.strip_suffix('\n').map(|text| text.strip_suffix('\r').unwrap_or(text)).unwrap_or(text);
    if text.is_empty() || text.contains('\0') {
        return Err(failed("it holds no password".to_string(), false));
    }
    Ok(Secret::new(text))
}

fn user(settings: &Settings, environment: &dyn Environment) -> Result<String, ConninfoError> {
    let given = settings.filled("user").map(str::to_string);
    given.or_else(|| environment.os_user()).ok_or(ConninfoError::NoUser)
}

/// Joins the lists of names, addresses and ports: equally long, but one port may serve all.
fn hosts(settings: &Settings, ssl_mode: SslMode, environment: &dyn Environment) -> Result<Vec<Host>, ConninfoError> {
    let names = settings.list("host");
    let addresses = settings.list("hostaddr");
    let count = if settings.filled("hostaddr").is_some() { addresses.len() } else { names.len() };
    let both = settings.filled("hostaddr").is_some() && settings.filled("host").is_some();
    if both && names.len() != count {
        return Err(ConninfoError::ListLength { what: "host addresses", given: count, hosts: names.len() });
    }
    let ports = settings.list("port");
    if ports.len() != 1 && ports.len() != count {
        return Err(ConninfoError::ListLength { what: "port numbers", given: ports.len(), hosts: count });
    }
    let one = |i: usize| {
        let port = port(settings, ports[if ports.len() == 1 { 0 } else { i }])?;
        let (name, address) = (names.get(i).unwrap_or(&""), addresses.get(i).unwrap_or(&""));
        if ssl_mode == SslMode::VerifyFull && name.trim().is_empty() && !address.trim().is_empty() {
            return Err(settings.invalid("hostaddr", "host beside it, the name sslmode=verify-full looks for"));
        }
        host(settings, name.trim(), address.trim(), port, environment)
    };
    (0..count).map(one).collect()
}

fn port(settings: &Settings, text: &str) -> Result<u16, ConninfoError> {
    match text.trim() {
        "" => Ok(PORT),
        text => text.parse().ok().filter(|&port| port > 0).ok_or_else(|| settings.invalid("port", "1 to 65535")),
    }
}

fn host(
    settings: &Settings,
    name: &str,
    address: &str,
    port: u16,
    environment: &dyn Environment,
) -> Result<Host, ConninfoError> {
    if !address.is_empty() {
        let ip: IpAddr = address.parse().map_err(|_| settings.invalid("hostaddr", "numeric IP addresses"))?;
        let name = if name.is_empty() { address } else { name };
        let address = Address::Tcp { host: name.to_string(), ip: Some(ip), port };
        return Ok(Host { address, passfile_name: passfile_name(name) });
    }
    let name = match name {
        "" if environment.is_directory(Path::new(SOCKET_DIRECTORY)) => SOCKET_DIRECTORY,
        "" => "localhost",
        name => name,
    };
    let address = match name.starts_with(['/', '@']) {
        true => Address::Unix { directory: PathBuf::from(name), port },
        false => Address::Tcp { host: name.to_string(), ip: None, port },
    };
    Ok(Host { address, passfile_name: passfile_name(name) })
}

fn passfile_name(host: &str) -> String {
    if host == SOCKET_DIRECTORY { "localhost".to_string() } else { host.to_string() }
}

#[cfg(test)]
mod tests {
    use super::super::environment::MemoryEnvironment;
    use super::*;
    use crate::error::Advice;
    use crate::replication::{AuthPolicy, CertMode, ChannelBinding, Roots, TlsVersion};

    fn parse(text: &str) -> Conninfo {
        Conninfo::parse(text, &MemoryEnvironment::new()).unwrap()
    }

    fn refused(text: &str) -> String {
        Conninfo::parse(text, &MemoryEnvironment::new()).unwrap_err().to_string()
    }

    fn passwords(conninfo: &Conninfo, purpose: Purpose, environment: &MemoryEnvironment) -> Vec<Option<String>> {
        let logins = conninfo.logins(purpose, environment).unwrap().logins;
        logins.into_iter().map(|login| login.password.map(|secret| secret.expose().to_string())).collect()
    }

    #[test]
    fn defaults_are_debians() {
        let with_socket = MemoryEnvironment::new().with_directory(SOCKET_DIRECTORY);
        let conninfo = Conninfo::parse("", &with_socket).unwrap();
        assert_eq!(conninfo.redacted(), "hosts /var/run/postgresql:5432 user tester dbname postgres");
        let login = &conninfo.logins(Purpose::Physical, &with_socket).unwrap().logins[0];
        assert_eq!(login.address, Address::Unix { directory: SOCKET_DIRECTORY.into(), port: 5432 });
        assert_eq!((login.ssl_mode, login.keepalive), (SslMode::Disable, None));
        assert_eq!((login.application_name.as_str(), login.options.as_str()), ("seawall", ""));

        let conninfo = parse("");
        assert_eq!(conninfo.hosts_summary(), "localhost:5432");
        let login = &conninfo.logins(Purpose::Sql, &MemoryEnvironment::new()).unwrap().logins[0];
        assert_eq!(login.kind, SessionKind::Sql { database: "postgres".into() });
        assert_eq!(login.ssl_mode, SslMode::Prefer);
        assert_eq!(login.connect_timeout, Duration::from_secs(10));
        assert_eq!(conninfo.target_session_attrs(), TargetSessionAttrs::Any);
        assert_eq!(Conninfo::parse("", &MemoryEnvironment::new().without_user()).unwrap_err(), ConninfoError::NoUser);
    }

    #[test]
    fn hosts_follow_libpqs_list_rules() {
        for (text, expected) in [
            ("host=a,b", "a:5432, b:5432"),
            ("host=a,b port=6000", "a:6000, b:6000"),
            ("host=a,b port=6000,", "a:6000, b:5432"),
            ("host=a,,/run port=1,2,3", "a:1, localhost:2, /run:3"),
            ("hostaddr=10.0.0.1,::1", "10.0.0.1:5432, [::1]:5432"),
            ("host=a,b hostaddr=10.0.0.1,10.0.0.2", "a:5432, b:5432"),
            ("host=@abstract", "@abstract:5432"),
            ("port=7", "localhost:7"),
            ("postgresql://h1:1,h2:2/db", "h1:1, h2:2"),
            ("postgresql://h1,h2:2", "h1:5432, h2:2"),
            ("postgresql://h1,h2", "h1:5432, h2:5432"),
            ("postgresql://[fe80::1]:7/", "[fe80::1]:7"),
            ("postgresql://%2Ftmp:7/", "/tmp:7"),
            ("postgresql:///db", "localhost:5432"),
        ] {
            assert_eq!(parse(text).hosts_summary(), expected, "{text}");
        }
        assert_eq!(refused("host=a,b port=1,2,3"), "could not match 3 port numbers to 2 hosts");
        assert_eq!(refused("host=a,b hostaddr=::1"), "could not match 1 host addresses to 2 hosts");
        assert_eq!(refused("port=0"), "invalid port \"0\" in the connection string: expected 1 to 65535");
        assert!(refused("port=65536").starts_with("invalid port"));
        assert!(refused("hostaddr=db").contains("numeric IP"));
    }

    #[test]
    fn hostaddr_overrides_resolving_only() {
        let conninfo = parse("host=db hostaddr=10.0.0.1");
        let login = &conninfo.logins(Purpose::Physical, &MemoryEnvironment::new()).unwrap().logins[0];
        let ip = Some("10.0.0.1".parse().unwrap());
        assert_eq!(login.address, Address::Tcp { host: "db".into(), ip, port: 5432 });
    }

    #[test]
    fn precedence_is_string_service_environment_default() {
        let environment = MemoryEnvironment::new()
            .with_file("/home/tester/.pg_service.conf", 0o600, "[s]\nhost=service\nuser=service\nport=2\n")
            .with_var("PGHOST", "env")
            .with_var("PGUSER", "env")
            .with_var("PGPORT", "3")
            .with_var("PGDATABASE", "env")
            .with_var("PGAPPNAME", "env")
            .with_var("PGOPTIONS", "-c a=b")
            .with_var("PGCONNECT_TIMEOUT", "1")
            .with_var("PGTARGETSESSIONATTRS", "read-write")
            .with_var("PGSSLMODE", "require");
        let show = |text: &str| Conninfo::parse(text, &environment).unwrap().redacted();
        assert_eq!(show(""), "hosts env:3 user env dbname env");
        assert_eq!(show("service=s"), "hosts service:2 user service dbname env");
        assert_eq!(show("service=s host=string"), "hosts string:2 user service dbname env");
        assert_eq!(show("host='' user=''"), "hosts localhost:3 user tester dbname env");
        let by_variable = environment.clone().with_var("PGSERVICE", "s");
        assert_eq!(Conninfo::parse("", &by_variable).unwrap().hosts_summary(), "service:2");

        let conninfo = Conninfo::parse("", &environment).unwrap();
        assert_eq!(conninfo.target_session_attrs(), TargetSessionAttrs::ReadWrite);
        let login = &conninfo.logins(Purpose::Physical, &environment).unwrap().logins[0];
        assert_eq!((login.application_name.as_str(), login.options.as_str()), ("env", "-c a=b"));
        assert_eq!((login.ssl_mode, login.connect_timeout), (SslMode::Require, Duration::from_secs(2)));
        let old = MemoryEnvironment::new().with_var("PGREQUIRESSL", "1");
        assert_eq!(Conninfo::parse("", &old).unwrap().ssl_mode, SslMode::Require);
    }

    #[test]
    fn what_is_not_built_is_refused() {
        for text in [
            "sslpassword=x",
            "gssencmode=require",
            "replication=database",
            "load_balance_hosts=random",
            "requirepeer=postgres",
            "client_encoding=LATIN1",
        ] {
            assert!(refused(text).contains(" is not available in this version"), "{text}: {}", refused(text));
        }
        let environment = MemoryEnvironment::new().with_var("PGREQUIREPEER", "me");
        assert_eq!(
            Conninfo::parse("", &environment).unwrap_err().to_string(),
            "requirepeer=me is not available in this version (asked for in the environment variable PGREQUIREPEER)"
        );
        assert!(refused("sslmode=on").contains("expected disable, allow, prefer"));
        assert!(refused("sslmode=").contains("expected"));
        assert!(!refused("sslpassword=canary").contains("canary"));
        parse("gssencmode=prefer channel_binding=prefer load_balance_hosts=disable client_encoding=UTF8 sslcert=''");
    }

    #[test]
    fn numbers_and_names_are_checked() {
        let timeout = |text: &str| parse(text).connect_timeout.as_secs();
        assert_eq!(["connect_timeout=0", "connect_timeout=-1", "connect_timeout=''"].map(timeout), [10; 3]);
        assert_eq!(["connect_timeout=1", "connect_timeout=2", "connect_timeout=60"].map(timeout), [2, 2, 60]);
        assert!(refused("connect_timeout=5s").contains("a whole number"));
        assert!(refused("target_session_attrs=rw").contains("read-write"));
        assert_eq!(parse("keepalives=0").keepalive, None);
        let seconds = Duration::from_secs;
        assert_eq!(parse("keepalives_idle=5 keepalives_count=2").keepalive, Some((seconds(5), seconds(10), 2)));
        assert_eq!(parse("tcp_user_timeout=1500").tcp_user_timeout, Some(Duration::from_millis(1500)));
        assert_eq!(parse("tcp_user_timeout=0").tcp_user_timeout, None);
        assert_eq!(parse(&format!("application_name={}", "x".repeat(63))).application_name().len(), 63);
        assert!(refused(&format!("application_name={}", "x".repeat(64))).contains("63"));
        assert!(refused("application_name=é").contains("ASCII"));
        assert_eq!(parse("fallback_application_name=f").application_name(), "f");
    }

    #[test]
    fn passwords_are_looked_up_in_libpqs_order() {
        let pgpass = "db:*:replication:tester:file-replication\ndb:*:postgres:tester:file-sql\n\
                      localhost:*:*:tester:file-local\n";
        let files = MemoryEnvironment::new().with_file("/home/tester/.pgpass", 0o600, pgpass).with_file(
            "/other",
            0o600,
            "*:*:*:*:other",
        );
        let with = |text: &str, purpose| passwords(&parse(text), purpose, &files);
        let some = |text: &str| vec![Some(text.to_string())];
        assert_eq!(with("host=db password=x", Purpose::Sql), some("x"));
        assert_eq!(with("host=db", Purpose::Sql), some("file-sql"));
        assert_eq!(with("host=db", Purpose::Physical), some("file-replication"));
        assert_eq!(with("host=db passfile=/other", Purpose::Physical), some("other"));
        assert_eq!(with("host=/var/run/postgresql", Purpose::Physical), some("file-local"));
        assert_eq!(with("host=/elsewhere", Purpose::Physical), [None]);
        assert_eq!(with("host=a,db", Purpose::Sql), [None, Some("file-sql".to_string())]);
        assert_eq!(with("host=db hostaddr=10.0.0.1", Purpose::Sql), some("file-sql"));

        let variable = files.clone().with_var("PGPASSWORD", "variable");
        assert_eq!(passwords(&parse("host=db"), Purpose::Sql, &variable), some("variable"));
        // An empty password keeps the variable out, and then the file is asked.
        assert_eq!(passwords(&parse("host=db password=''"), Purpose::Sql, &variable), some("file-sql"));
        assert_eq!(with("host=db passfile=/absent", Purpose::Sql), [None]);
    }

    #[test]
    fn explicit_dbname_is_looked_up_first_for_replication() {
        let pgpass = "db:*:app:tester:app\ndb:*:replication:tester:replication\n";
        let environment =
            MemoryEnvironment::new().with_file("/home/tester/.pgpass", 0o600, pgpass).with_var("PGDATABASE", "app");
        let find = |text: &str| {
            let conninfo = Conninfo::parse(text, &environment).unwrap();
            passwords(&conninfo, Purpose::Physical, &environment)[0].clone().unwrap()
        };
        assert_eq!(find("host=db dbname=app"), "app");
        assert_eq!(find("host=db dbname=postgres"), "replication");
        assert_eq!(find("host=db"), "replication");
    }

    #[test]
    fn password_file_is_read_anew_each_time() {
        let conninfo = parse("host=db").with_password_file("/secret");
        let at = |mode, text| MemoryEnvironment::new().with_file("/secret", mode, text);
        assert_eq!(passwords(&conninfo, Purpose::Physical, &at(0o600, "one\n")), [Some("one".to_string())]);
        assert_eq!(passwords(&conninfo, Purpose::Physical, &at(0o440, "two \r\n")), [Some("two ".to_string())]);
        assert_eq!(conninfo.logins(Purpose::Sql, &at(0o644, "x")).unwrap().warnings.len(), 1);
        let error = conninfo.logins(Purpose::Sql, &MemoryEnvironment::new()).unwrap_err();
        assert!(error.to_string().starts_with("could not read password file /secret"), "{error}");
        assert!(conninfo.logins(Purpose::Sql, &at(0o600, "\n")).is_err());
    }

    #[test]
    fn tls_settings_have_libpqs_defaults_and_variables() {
        let security = parse("host=db").security;
        let home = |name: &str| Some(PathBuf::from(format!("/home/tester/.postgresql/{name}")));
        assert_eq!(security.roots, Roots::File(home("root.crt").unwrap()));
        assert_eq!((security.certificate, security.key), (home("postgresql.crt"), home("postgresql.key")));
        assert_eq!((security.crl, security.crl_default), (None, home("root.crl")));
        let variables = [
            ("PGSSLMODE", "verify-ca"),
            ("PGSSLROOTCERT", "/ca"),
            ("PGSSLCERT", "/c"),
            ("PGSSLKEY", "/k"),
            ("PGSSLCRL", "/l"),
            ("PGSSLCRLDIR", "/d"),
            ("PGSSLSNI", "0"),
            ("PGSSLCERTMODE", "require"),
            ("PGSSLNEGOTIATION", "direct"),
            ("PGSSLMINPROTOCOLVERSION", "tlsv1.3"),
            ("PGCHANNELBINDING", "require"),
            ("PGREQUIREAUTH", "!password"),
        ];
        let environment =
            variables.iter().fold(MemoryEnvironment::new(), |all, (name, value)| all.with_var(name, value));
        let found = Conninfo::parse("host=db", &environment).unwrap();
        assert_eq!(found.ssl_mode, SslMode::VerifyCa);
        let path = |name: &str| Some(PathBuf::from(name));
        let expected = Security {
            roots: Roots::File("/ca".into()),
            certificate: path("/c"),
            key: path("/k"),
            cert_mode: CertMode::Require,
            crl: path("/l"),
            crl_directory: path("/d"),
            crl_default: home("root.crl"),
            sni: false,
            min_version: TlsVersion::V13,
            max_version: TlsVersion::V13,
            direct: true,
            channel_binding: ChannelBinding::Require,
            require_auth: AuthPolicy::parse("!password"),
        };
        assert_eq!(found.security, expected);
        let emptied = Conninfo::parse("host=db sslrootcert='' sslcert='' sslnegotiation=''", &environment).unwrap();
        assert_eq!(emptied.security.certificate, home("postgresql.crt"));
    }

    #[test]
    fn weak_combinations_are_refused_as_by_libpq() {
        assert_eq!(parse("sslrootcert=system").ssl_mode, SslMode::VerifyFull);
        for mode in ["disable", "allow", "prefer", "require", "verify-ca"] {
            let text = refused(&format!("sslrootcert=system sslmode={mode}"));
            assert!(text.contains("expected verify-full with sslrootcert=system"), "{text}");
        }
        for text in ["sslnegotiation=direct", "sslnegotiation=direct sslmode=prefer"] {
            assert!(refused(text).contains("require or stronger"), "{}", refused(text));
        }
        parse("sslnegotiation=direct sslmode=require");
        parse("sslnegotiation=direct sslrootcert=system");
        assert!(refused("hostaddr=10.0.0.1 sslmode=verify-full").contains("host beside it"));
        parse("host=db hostaddr=10.0.0.1 sslmode=verify-full");
        for text in [
            "channel_binding=yes",
            "require_auth=scram",
            "require_auth=md5,!password",
            "sslcertmode=no",
            "sslsni=2",
            "sslnegotiation=tls",
            "ssl_min_protocol_version=TLSv1.4",
            "ssl_max_protocol_version=TLSv1.1",
            "ssl_min_protocol_version=TLSv1.3 ssl_max_protocol_version=TLSv1.2",
        ] {
            assert!(refused(text).contains("expected"), "{text}: {}", refused(text));
        }
        parse("ssl_min_protocol_version=TLSv1 sslcertmode=disable require_auth=none");
    }

    #[test]
    fn written_keywords_read_back_without_the_password() {
        let text = r"dbname='a \'b\\' password=canary host=h1,h2 options='-c x=y' port=1";
        let conninfo = parse(text);
        assert_eq!(conninfo.to_keywords(), r"host=h1,h2 port=1 dbname='a \'b\\' options='-c x=y'");
        assert_eq!(parse(&conninfo.to_keywords()).redacted(), conninfo.redacted());
        assert!(conninfo.password_in_string());
    }

    proptest::proptest! {
        /// Whatever surrounds it, however it is broken: no message, hint or Debug shows the password.
        #[test]
        fn password_is_never_shown(
            before in "(host=[a-z/:,@%]{0,6} ?|[a-z_]{1,8}=[a-z']{0,3} |postgresql://u:){0,2}",
            password in "[ -~]{0,3}canary[ -~]{0,3}",
            quoted in proptest::bool::ANY,
            after in "( [a-z_]{0,8}=?[a-z0-9']{0,4}|@h:x|@h/d\\?x){0,2}",
        ) {
            // A password that begins with "@" is an empty one and a host, to any reader.
            let password = password.replace(['\'', '\\', ' ', '=', '@'], "");
            let text = match (before.contains("://"), quoted) {
                (true, _) => format!("{before}{password}{after}"),
                (false, true) => format!("{before}password='{password}'{after}"),
                (false, false) => format!("{before} password={password}{after}"),
            };
            // A URI without credentials, where "canary" stands for a host, is no password.
            let uri_host = before.contains("://") && !format!("{password}{after}").contains('@');
            let shown = match Conninfo::parse(&text, &MemoryEnvironment::new()) {
                Ok(conninfo) => {
                    let logins = conninfo.logins(Purpose::Sql, &MemoryEnvironment::new());
                    format!("{conninfo} {conninfo:?} {} {logins:?}", conninfo.to_keywords())
                }
                Err(error) => format!("{error} {error:?} {:?}", error.hint()),
            };
            proptest::prop_assert!(uri_host || !shown.contains("canary"), "{text} shows {shown}");
        }
    }
}
