//! Owns: from the settings to what is demanded of TLS and authentication, with libpq's defaults and refusals.
//! Does not own: reading the files named here (`replication`), hosts and passwords (`conninfo`).

use std::path::PathBuf;

use super::environment::Environment;
use super::error::ConninfoError;
use super::settings::Settings;
use crate::replication::{AuthPolicy, CertMode, ChannelBinding, Roots, Security, SslMode, TlsVersion};

/// Below the home directory.
const DIRECTORY: &str = ".postgresql";

/// `sslmode` and everything that goes with it.
pub(super) fn read(settings: &Settings, environment: &dyn Environment) -> Result<(SslMode, Security), ConninfoError> {
    let of_home = |name: &str| environment.home().map(|home| home.join(DIRECTORY).join(name));
    let named = |keyword: &str| settings.filled(keyword).map(PathBuf::from);
    let roots = match settings.filled("sslrootcert") {
        Some("system") => Roots::System,
        Some(path) => Roots::File(path.into()),
        None => of_home("root.crt").map_or(Roots::Nowhere, Roots::File),
    };
    let direct = choose(settings, "sslnegotiation", "postgres or direct", &[("postgres", false), ("direct", true)])?;
    let direct = direct.unwrap_or(false);
    let ssl_mode = ssl_mode(settings, &roots, direct)?;
    let (min_version, max_version) = versions(settings)?;
    let binding = [
        ("disable", ChannelBinding::Disable),
        ("prefer", ChannelBinding::Prefer),
        ("require", ChannelBinding::Require),
    ];
    let cert_modes = [("disable", CertMode::Disable), ("allow", CertMode::Allow), ("require", CertMode::Require)];
    let security = Security {
        roots,
        certificate: named("sslcert").or_else(|| of_home("postgresql.crt")),
        key: named("sslkey").or_else(|| of_home("postgresql.key")),
        cert_mode: choose(settings, "sslcertmode", "disable, allow or require", &cert_modes)?.unwrap_or_default(),
        crl: named("sslcrl"),
        crl_directory: named("sslcrldir"),
        crl_default: of_home("root.crl"),
        sni: choose(settings, "sslsni", "0 or 1", &[("0", false), ("1", true)])?.unwrap_or(true),
        min_version,
        max_version,
        direct,
        channel_binding: choose(settings, "channel_binding", "disable, prefer or require", &binding)?
            .unwrap_or_default(),
        require_auth: require_auth(settings)?,
    };
    Ok((ssl_mode, security))
}

fn ssl_mode(settings: &Settings, roots: &Roots, direct: bool) -> Result<SslMode, ConninfoError> {
    const KEYWORD: &str = "sslmode";
    const ALL: [SslMode; 6] =
        [SslMode::Disable, SslMode::Allow, SslMode::Prefer, SslMode::Require, SslMode::VerifyCa, SslMode::VerifyFull];
    let mode = match settings.get(KEYWORD) {
        // Public authorities vouch for anybody: without the name they are no verification.
        None if *roots == Roots::System => SslMode::VerifyFull,
        None => SslMode::Prefer,
        Some(setting) => ALL
            .into_iter()
            .find(|mode| mode.name() == setting.value)
            .ok_or_else(|| settings.invalid(KEYWORD, "disable, allow, prefer, require, verify-ca or verify-full"))?,
    };
    if *roots == Roots::System && mode != SslMode::VerifyFull {
        return Err(settings.invalid(KEYWORD, "verify-full with sslrootcert=system"));
    }
    if direct && mode.permits_plain() {
        let keyword = if settings.get(KEYWORD).is_some() { KEYWORD } else { "sslnegotiation" };
        return Err(settings.invalid(keyword, "sslmode=require or stronger with sslnegotiation=direct"));
    }
    Ok(mode)
}

fn versions(settings: &Settings) -> Result<(TlsVersion, TlsVersion), ConninfoError> {
    const MIN: &str = "ssl_min_protocol_version";
    const MAX: &str = "ssl_max_protocol_version";
    // Older minima are met by what there is; an older maximum cannot be.
    let minima = [
        ("TLSv1", TlsVersion::V12),
        ("TLSv1.1", TlsVersion::V12),
        ("TLSv1.2", TlsVersion::V12),
        ("TLSv1.3", TlsVersion::V13),
    ];
    let maxima = [("TLSv1.2", TlsVersion::V12), ("TLSv1.3", TlsVersion::V13)];
    let min = choose(settings, MIN, "TLSv1, TLSv1.1, TLSv1.2 or TLSv1.3", &minima)?.unwrap_or(TlsVersion::V12);
    let max = choose(settings, MAX, "TLSv1.2 or TLSv1.3 (nothing older is spoken)", &maxima)?;
    let max = max.unwrap_or(TlsVersion::V13);
    if min > max {
        return Err(settings.invalid(MAX, "at least ssl_min_protocol_version"));
    }
    Ok((min, max))
}

fn require_auth(settings: &Settings) -> Result<Option<AuthPolicy>, ConninfoError> {
    const KEYWORD: &str = "require_auth";
    const EXPECTED: &str =
        "password, md5, gss, sspi, scram-sha-256, oauth or none, separated by commas, or each with ! before it";
    let Some(text) = settings.filled(KEYWORD) else { return Ok(None) };
    AuthPolicy::parse(text).map(Some).ok_or_else(|| settings.invalid(KEYWORD, EXPECTED))
}

/// The value's meaning; versions of TLS are compared without regard to case, as in libpq.
fn choose<T: Copy>(
    settings: &Settings,
    keyword: &'static str,
    expected: &'static str,
    meanings: &[(&str, T)],
) -> Result<Option<T>, ConninfoError> {
    let Some(value) = settings.filled(keyword) else { return Ok(None) };
    let is_version = keyword.ends_with("_protocol_version");
    let fits = |word: &str| if is_version { word.eq_ignore_ascii_case(value) } else { word == value };
    let found = meanings.iter().find(|(word, _)| fits(word));
    found.map(|(_, meaning)| Some(*meaning)).ok_or_else(|| settings.invalid(keyword, expected))
}
