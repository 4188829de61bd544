//! Owns: whether a certificate's names are those of the host asked for, by libpq's rules (`fe-secure-common.c`, 15+).
//! Does not own: reading names out of a certificate (`certificate`), the chain (`verify`).

use std::net::IpAddr;

/// The names a certificate bears.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    pub dns: Vec<String>,
    /// As encoded: 4 or 16 bytes, whatever else a broken certificate holds.
    pub addresses: Vec<Vec<u8>>,
    /// The first common name of the subject.
    pub common: Option<String>,
}

/// How a host was found among the names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Match {
    No,
    /// In the subject alternative names.
    Alternative,
    /// In the common name, which counts where there is no alternative name of the host's kind.
    Common,
}

impl Names {
    pub fn find(&self, host: &str) -> Match {
        let ip: Option<IpAddr> = host.parse().ok();
        let of_kind = match ip {
            Some(_) => !self.addresses.is_empty(),
            None => !self.dns.is_empty(),
        };
        let by_address = ip.is_some_and(|ip| self.addresses.iter().any(|bytes| is_address(bytes, ip)));
        // An address may stand among the DNS names too: libpq compares both with whatever was asked for.
        if by_address || self.dns.iter().any(|name| is_name(name, host)) {
            Match::Alternative
        } else if !of_kind && self.common.as_ref().is_some_and(|name| is_name(name, host)) {
            Match::Common
        } else {
            Match::No
        }
    }

    /// For messages.
    pub fn list(&self) -> String {
        const SHOWN: usize = 8;
        let address = |bytes: &Vec<u8>| match bytes.len() {
            4 => <[u8; 4]>::try_from(bytes.as_slice()).map(|b| IpAddr::from(b).to_string()),
            _ => <[u8; 16]>::try_from(bytes.as_slice()).map(|b| IpAddr::from(b).to_string()),
        };
        let mut names: Vec<String> = self.dns.clone();
        names.extend(self.addresses.iter().filter_map(|bytes| address(bytes).ok()));
        if names.is_empty() {
            names.extend(self.common.clone());
        }
        let more = if names.len() > SHOWN { format!(" and {} more", names.len() - SHOWN) } else { String::new() };
        names.truncate(SHOWN);
        if names.is_empty() { "no name".to_string() } else { names.join(", ") + &more }
    }
}

fn is_address(bytes: &[u8], ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => bytes == ip.octets(),
        IpAddr::V6(ip) => bytes == ip.octets(),
    }
}

/// Without regard to case; `*.` stands for one leftmost label.
fn is_name(pattern: &str, host: &str) -> bool {
    if pattern.contains('\0') {
        return false;
    }
    if pattern.eq_ignore_ascii_case(host) {
        return true;
    }
    let Some(rest) = pattern.strip_prefix('*').filter(|rest| rest.len() > 1 && rest.starts_with('.')) else {
        return false;
    };
    let Some((label, parent)) = host.find('.').map(|dot| host.split_at(dot)) else { return false };
    !label.is_empty() && parent.eq_ignore_ascii_case(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dns: &[&str], addresses: &[&[u8]], common: Option<&str>) -> Names {
        Names {
            dns: dns.iter().map(|name| name.to_string()).collect(),
            addresses: addresses.iter().map(|bytes| bytes.to_vec()).collect(),
            common: common.map(str::to_string),
        }
    }

    #[test]
    fn names_match_as_in_libpq() {
        for (pattern, host, matches) in [
            ("db.example.com", "DB.example.COM", true),
            ("*.example.com", "db.example.com", true),
            ("*.EXAMPLE.com", "db.example.COM", true),
            ("*.example.com", "a.db.example.com", false),
            ("*.example.com", "example.com", false),
            ("*.example.com", ".example.com", false),
            ("d*.example.com", "db.example.com", false),
            ("*", "db", false),
            ("*.", "db.", false),
            ("*example.com", "dbexample.com", false),
            ("db.example.com\0.evil.org", "db.example.com", false),
            ("db.example.com.", "db.example.com", false),
        ] {
            assert_eq!(is_name(pattern, host), matches, "{pattern} {host}");
        }
    }

    #[test]
    fn the_common_name_counts_only_without_alternatives_of_the_kind() {
        assert_eq!(names(&[], &[], Some("db")).find("db"), Match::Common);
        assert_eq!(names(&["other"], &[], Some("db")).find("db"), Match::No);
        assert_eq!(names(&[], &[&[10, 0, 0, 1]], Some("db")).find("db"), Match::Common);
        assert_eq!(names(&["other"], &[], Some("10.0.0.1")).find("10.0.0.1"), Match::Common);
        assert_eq!(names(&[], &[&[10, 0, 0, 2]], Some("10.0.0.1")).find("10.0.0.1"), Match::No);
        assert_eq!(names(&[], &[], None).find("db"), Match::No);
    }

    #[test]
    fn addresses_match_by_value() {
        let loopback: &[u8] = &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
        let both = names(&["db"], &[&[10, 0, 0, 1], loopback, &[1, 2, 3]], None);
        assert_eq!(both.find("10.0.0.1"), Match::Alternative);
        assert_eq!(both.find("0:0::1"), Match::Alternative);
        assert_eq!(both.find("10.0.0.2"), Match::No);
        assert_eq!(both.list(), "db, 10.0.0.1, ::1");
        assert_eq!(names(&["10.0.0.1"], &[], None).find("10.0.0.1"), Match::Alternative);
        assert_eq!(names(&[], &[], None).list(), "no name");
    }
}
