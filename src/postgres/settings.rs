//! Owns: what string, service, environment and defaults say together, keyword by keyword.
//! Does not own: hosts, users and passwords (`conninfo`).
//!
//! Precedence, as in libpq: connection string > service > environment > default.

use std::collections::BTreeMap;
use std::time::Duration;

use super::conninfo::TargetSessionAttrs;
use super::environment::Environment;
use super::error::{ConninfoError, Origin};
use super::keywords::{self, KEYWORDS, Keyword, Support};
use super::{service, syntax};

/// libpq waits forever by default. Longer would keep a dead first host from being skipped; shorter would give up on a
/// server that is busy forking.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// libpq's own minimum: less than this fails on ordinary hiccups.
const CONNECT_TIMEOUT_MIN: Duration = Duration::from_secs(2);
/// Idle, interval, count where the string leaves them to us. Linux' own two hours would leave a dead peer unnoticed
/// until the protocol's deadlines catch it.
const KEEPALIVE: (u32, u32, u32) = (60, 10, 6);
/// `NAMEDATALEN - 1`: the server cuts longer ones, and `synchronous_standby_names` would then not match.
const APPLICATION_NAME_BYTES_MAX: usize = 63;

/// A value and where it comes from.
pub(super) struct Setting {
    pub value: String,
    origin: Origin,
    /// False where the value could be a piece of a password.
    shown: bool,
}

/// What string, service and environment say together, by keyword.
pub(super) struct Settings(BTreeMap<&'static str, Setting>);

impl Settings {
    pub fn gather(text: &str, environment: &dyn Environment) -> Result<Settings, ConninfoError> {
        let mut settings = Settings(BTreeMap::new());
        for pair in syntax::parse(text)? {
            let setting = Setting { value: pair.value, origin: Origin::String, shown: pair.shown };
            settings.0.insert(pair.keyword.name, setting);
        }
        settings.add_service(environment)?;
        for keyword in KEYWORDS {
            settings.add_variable(keyword, environment);
        }
        Ok(settings)
    }

    fn add_service(&mut self, environment: &dyn Environment) -> Result<(), ConninfoError> {
        for name in ["service", "servicefile"] {
            self.add_variable(keywords::find(name).expect("both are in the table"), environment);
        }
        let Some(name) = self.filled("service").map(str::to_string) else { return Ok(()) };
        let service = service::find(&name, self.filled("servicefile"), environment)?;
        for (keyword, value) in service.settings {
            let origin = Origin::Service { name: name.clone(), path: service.path.clone() };
            let shown = keyword.name != "password";
            self.0.entry(keyword.name).or_insert(Setting { value, origin, shown });
        }
        Ok(())
    }

    fn add_variable(&mut self, keyword: &Keyword, environment: &dyn Environment) {
        let Some(variable) = keyword.variable else { return };
        let mut found = environment.var(variable).map(|value| (variable, value));
        // The ancestor of PGSSLMODE, which libpq still obeys.
        if found.is_none() && keyword.name == "sslmode" {
            let required = environment.var("PGREQUIRESSL").is_some_and(|value| value.starts_with('1'));
            found = required.then(|| ("PGREQUIRESSL", "require".to_string()));
        }
        if let Some((variable, value)) = found {
            let setting = Setting { value, origin: Origin::Variable(variable), shown: true };
            self.0.entry(keyword.name).or_insert(setting);
        }
    }

    pub fn refuse_unavailable(&self) -> Result<(), ConninfoError> {
        for keyword in KEYWORDS {
            let Support::Only { accepted, instead } = keyword.support else { continue };
            let Some(setting) = self.get(keyword.name).filter(|setting| !setting.value.is_empty()) else { continue };
            if !accepted.contains(&setting.value.as_str()) {
                return Err(setting.not_available(keyword.name, instead));
            }
        }
        Ok(())
    }

    pub fn get(&self, keyword: &str) -> Option<&Setting> {
        self.0.get(keyword)
    }

    /// An empty value keeps lower layers out, and then means the default: libpq's way.
    pub fn filled(&self, keyword: &str) -> Option<&str> {
        self.get(keyword).map(|setting| setting.value.as_str()).filter(|value| !value.is_empty())
    }

    pub fn is_written(&self, keyword: &str) -> bool {
        self.get(keyword).is_some_and(|setting| setting.origin == Origin::String && !setting.value.is_empty())
    }

    pub fn written(&self) -> Vec<(&'static str, String)> {
        // In the table's order, hosts first.
        let from_string = |keyword: &'static Keyword| {
            let setting = self.get(keyword.name).filter(|setting| setting.origin == Origin::String)?;
            (keyword.name != "password").then(|| (keyword.name, setting.value.clone()))
        };
        KEYWORDS.iter().filter_map(from_string).collect()
    }

    pub fn invalid(&self, keyword: &'static str, expected: &'static str) -> ConninfoError {
        let setting = self.get(keyword).expect("only a given value can be invalid");
        ConninfoError::InvalidValue { origin: setting.origin.clone(), keyword, value: setting.showable(), expected }
    }

    pub fn target_session_attrs(&self) -> Result<TargetSessionAttrs, ConninfoError> {
        const KEYWORD: &str = "target_session_attrs";
        Ok(match self.filled(KEYWORD) {
            None | Some("any") => TargetSessionAttrs::Any,
            Some("read-write") => TargetSessionAttrs::ReadWrite,
            Some("read-only") => TargetSessionAttrs::ReadOnly,
            Some("primary") => TargetSessionAttrs::Primary,
            Some("standby") => TargetSessionAttrs::Standby,
            Some("prefer-standby") => TargetSessionAttrs::PreferStandby,
            Some(_) => {
                return Err(self.invalid(KEYWORD, "any, read-write, read-only, primary, standby or prefer-standby"));
            }
        })
    }

    pub fn application_name(&self) -> Result<String, ConninfoError> {
        let keyword = ["application_name", "fallback_application_name"].into_iter().find(|k| self.filled(k).is_some());
        let Some(keyword) = keyword else { return Ok("seawall".to_string()) };
        let name = self.filled(keyword).expect("it was just found");
        // The server replaces other characters; a name that does not come back as sent matches nothing.
        if name.len() > APPLICATION_NAME_BYTES_MAX || !name.bytes().all(|b| (b' '..=b'~').contains(&b)) {
            return Err(self.invalid(keyword, "at most 63 printable ASCII characters"));
        }
        Ok(name.to_string())
    }

    fn integer(&self, keyword: &'static str) -> Result<Option<i32>, ConninfoError> {
        let Some(value) = self.filled(keyword) else { return Ok(None) };
        let number = value.trim().parse().map_err(|_| self.invalid(keyword, "a whole number"))?;
        Ok(Some(number))
    }

    /// Zero and below mean the default: "forever" is not offered, every network call has a deadline.
    pub fn connect_timeout(&self) -> Result<Duration, ConninfoError> {
        let seconds = self.integer("connect_timeout")?.filter(|&seconds| seconds > 0);
        let given = seconds.map(|seconds| Duration::from_secs(u64::from(seconds.unsigned_abs())));
        Ok(given.map_or(CONNECT_TIMEOUT, |given| given.max(CONNECT_TIMEOUT_MIN)))
    }

    pub fn keepalive(&self) -> Result<Option<(Duration, Duration, u32)>, ConninfoError> {
        let or_default = |keyword, default| -> Result<u32, ConninfoError> {
            Ok(self.integer(keyword)?.filter(|&n| n > 0).map_or(default, i32::unsigned_abs))
        };
        let idle = or_default("keepalives_idle", KEEPALIVE.0)?;
        let interval = or_default("keepalives_interval", KEEPALIVE.1)?;
        let count = or_default("keepalives_count", KEEPALIVE.2)?;
        let on = self.integer("keepalives")?.is_none_or(|on| on != 0);
        Ok(on.then(|| (Duration::from_secs(idle.into()), Duration::from_secs(interval.into()), count)))
    }

    pub fn tcp_user_timeout(&self) -> Result<Option<Duration>, ConninfoError> {
        let milliseconds = self.integer("tcp_user_timeout")?.filter(|&ms| ms > 0);
        Ok(milliseconds.map(|ms| Duration::from_millis(u64::from(ms.unsigned_abs()))))
    }

    /// The parts of a comma-separated list; one empty part when it is not given.
    pub fn list(&self, keyword: &str) -> Vec<&str> {
        self.filled(keyword).unwrap_or_default().split(',').collect()
    }
}

impl Setting {
    /// The value if it is short and plain. Longer ones, and those with blanks or "=", may have swallowed a password.
    fn showable(&self) -> Option<String> {
        let plain = self.value.len() <= 64 && !self.value.contains(|c: char| c.is_whitespace() || c == '=');
        (self.shown && plain).then(|| self.value.clone())
    }

    fn not_available(&self, keyword: &'static str, instead: &'static str) -> ConninfoError {
        let secret = ["sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key"].contains(&keyword);
        let value = self.showable().filter(|_| !secret);
        ConninfoError::NotAvailable { origin: self.origin.clone(), keyword, value, instead }
    }
}
