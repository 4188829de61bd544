//! Owns: the two spellings of a connection string, as libpq reads them: `keyword = value` and `postgresql://`.
//! Does not own: what the values mean, defaults (`conninfo`).
//! Stricter than libpq where a password with an unquoted special character would end up in a host or database name:
//! such a string is refused, since names are shown in logs.

use super::error::{ConninfoError, Origin};
use super::keywords::{self, Keyword};

/// One setting as written. Not `Debug`: the value may be the password.
pub(super) struct Pair {
    pub keyword: &'static Keyword,
    pub value: String,
    /// False where a wrong value may be a piece of a password, and is therefore not quoted in errors.
    pub shown: bool,
}

/// Settings in the order written; of a repeated one the last counts.
pub(super) fn parse(text: &str) -> Result<Vec<Pair>, ConninfoError> {
    if text.contains('\0') {
        return Err(syntax(1, "it contains a NUL character"));
    }
    let scheme = ["postgresql://", "postgres://"].into_iter().find(|scheme| text.starts_with(scheme));
    match scheme {
        Some(scheme) => parse_uri(&text[scheme.len()..], scheme.len()),
        None => parse_keywords(text),
    }
}

fn syntax(at: usize, problem: &'static str) -> ConninfoError {
    ConninfoError::Syntax { at, problem }
}

/// `host=db user = 'a b' options=-c\ x=1`
fn parse_keywords(text: &str) -> Result<Vec<Pair>, ConninfoError> {
    let mut reader = Reader { chars: text.chars().collect(), at: 0 };
    let mut pairs: Vec<Pair> = Vec::new();
    loop {
        reader.skip_space();
        if reader.peek().is_none() {
            return Ok(pairs);
        }
        let name = reader.keyword()?;
        let start = reader.at;
        let value = reader.value()?;
        if name != "password" && name != "options" && swallowed_password(&value) {
            return Err(syntax(start + 1, "the value here contains another connection string; is a quote missing?"));
        }
        let after_password = pairs.iter().any(|pair| pair.keyword.name == "password");
        let keyword = known(&name, after_password)?;
        pairs.push(Pair { keyword, value, shown: keyword.name != "password" });
    }
}

/// After `user= password=x`, or with a quote missing, libpq takes the password for a user name, which logs would show.
/// So it would with `host=postgresql://…`.
fn swallowed_password(value: &str) -> bool {
    if value.contains("://") {
        return true;
    }
    value.match_indices("password").any(|(i, word)| value[i + word.len()..].trim_start().starts_with('='))
}

/// A word behind the password may be the rest of the password: it is compared, but not repeated.
fn known(name: &str, after_password: bool) -> Result<&'static Keyword, ConninfoError> {
    let plain = name.len() <= 40 && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    keywords::find(name).ok_or_else(|| ConninfoError::UnknownKeyword {
        origin: Origin::String,
        keyword: (plain && !after_password).then(|| name.to_string()),
        nearest: keywords::nearest(name),
    })
}

struct Reader {
    chars: Vec<char>,
    at: usize,
}

impl Reader {
    fn peek(&self) -> Option<char> {
        self.chars.get(self.at).copied()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += 1;
        Some(c)
    }

    fn skip_space(&mut self) {
        while self.peek().is_some_and(is_space) {
            self.at += 1;
        }
    }

    /// The name, and the `=` behind it.
    fn keyword(&mut self) -> Result<String, ConninfoError> {
        let start = self.at;
        while self.peek().is_some_and(|c| c != '=' && !is_space(c)) {
            self.at += 1;
        }
        let name = self.chars[start..self.at].iter().collect();
        self.skip_space();
        match self.next() {
            Some('=') => Ok(name),
            _ => Err(syntax(start + 1, "the word that begins here is not followed by \"=\"")),
        }
    }

    fn value(&mut self) -> Result<String, ConninfoError> {
        self.skip_space();
        if self.peek() == Some('\'') {
            return self.quoted();
        }
        let mut value = String::new();
        while let Some(c) = self.peek().filter(|&c| !is_space(c)) {
            self.at += 1;
            match c {
                '\\' => value.extend(self.next()),
                c => value.push(c),
            }
        }
        Ok(value)
    }

    fn quoted(&mut self) -> Result<String, ConninfoError> {
        let start = self.at;
        self.at += 1;
        let mut value = String::new();
        loop {
            match self.next() {
                None => return Err(syntax(start + 1, "the quoted value that begins here does not end")),
                Some('\'') => return Ok(value),
                Some('\\') => value.extend(self.next()),
                Some(c) => value.push(c),
            }
        }
    }
}

/// C's `isspace`, which libpq uses.
fn is_space(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\n' | '\r' | '\x0b' | '\x0c')
}

/// `user:password@host:port,host:port/dbname?keyword=value`; `offset` is the length of the scheme, for positions.
fn parse_uri(text: &str, offset: usize) -> Result<Vec<Pair>, ConninfoError> {
    let mut pairs = Vec::new();
    let mut rest = text;
    let mut add = |name: &'static str, value: &str, at: usize| -> Result<(), ConninfoError> {
        if !value.is_empty() {
            let keyword = keywords::find(name).expect("the parts of a URI are keywords");
            pairs.push(Pair { keyword, value: percent_decode(value, at)?, shown: false });
        }
        Ok(())
    };
    // libpq looks for the end of the credentials no further than the first slash.
    let authority = &rest[..rest.find('/').unwrap_or(rest.len())];
    if let Some(end) = authority.find('@') {
        let (user, password) = authority[..end].split_once(':').unwrap_or((&authority[..end], ""));
        add("user", user, offset + 1)?;
        add("password", password, offset + user.len() + 2)?;
        rest = &rest[end + 1..];
    }
    let at = offset + text.len() - rest.len() + 1;
    let (hosts, ports, after) = netlocs(rest, at)?;
    add("host", &hosts, at)?;
    add("port", &ports, at)?;
    let at = offset + text.len() - after.len() + 1;
    let (database, query) = after.split_once('?').unwrap_or((after, ""));
    let database = database.strip_prefix('/').unwrap_or(database);
    if database.contains('@') {
        return Err(syntax(at, "there is an \"@\" behind the first \"/\""));
    }
    add("dbname", database, at)?;
    parse_query(query, offset + text.len() - query.len() + 1, &mut pairs)?;
    Ok(pairs)
}

/// The comma-separated hosts and ports, and what follows them. Lists are joined again, as libpq does: its
/// rules for lists apply to both spellings alike.
fn netlocs(text: &str, at: usize) -> Result<(String, String, &str), ConninfoError> {
    let (mut hosts, mut ports) = (String::new(), String::new());
    let mut rest = text;
    loop {
        let here = at + text.len() - rest.len();
        let (host, after) = netloc_host(rest, here)?;
        if host.find('@').is_some_and(|i| i > 0) {
            return Err(syntax(here, "there is a second \"@\""));
        }
        hosts.push_str(host);
        rest = after;
        if let Some(after) = rest.strip_prefix(':') {
            let end = after.find(['/', '?', ',']).unwrap_or(after.len());
            ports.push_str(&after[..end]);
            rest = &after[end..];
        }
        match rest.strip_prefix(',') {
            Some(after) => rest = after,
            None => break,
        }
        hosts.push(',');
        ports.push(',');
    }
    // "a,b" without any port leaves only commas, which is the same as none.
    Ok((hosts, ports, rest))
}

fn netloc_host(text: &str, at: usize) -> Result<(&str, &str), ConninfoError> {
    let Some(inside) = text.strip_prefix('[') else {
        return Ok(text.split_at(text.find([':', '/', '?', ',']).unwrap_or(text.len())));
    };
    let end = inside.find(']').ok_or_else(|| syntax(at, "the \"[\" here is not closed"))?;
    let (host, after) = (&inside[..end], &inside[end + 1..]);
    if host.is_empty() {
        return Err(syntax(at, "the IPv6 address is empty"));
    }
    if !(after.is_empty() || after.starts_with([':', '/', '?', ','])) {
        return Err(syntax(at, "the IPv6 address is followed by something other than \":\", \"/\", \"?\" or \",\""));
    }
    Ok((host, after))
}

fn parse_query(query: &str, at: usize, pairs: &mut Vec<Pair>) -> Result<(), ConninfoError> {
    if query.is_empty() {
        return Ok(());
    }
    for part in query.strip_suffix('&').unwrap_or(query).split('&') {
        let (name, value) = part.split_once('=').ok_or_else(|| syntax(at, "a parameter behind \"?\" has no \"=\""))?;
        if value.contains('=') {
            return Err(syntax(at, "a parameter behind \"?\" has two \"=\"; write the second as %3D"));
        }
        let (name, value) = (percent_decode(name, at)?, percent_decode(value, at)?);
        // JDBC's spelling, which libpq accepts too.
        let (name, value) = match (name.as_str(), value.as_str()) {
            ("ssl", "true") => ("sslmode".to_string(), "require".to_string()),
            _ => (name, value),
        };
        let after_password = pairs.iter().any(|pair| pair.keyword.name == "password");
        let keyword = known(&name, after_password)?;
        pairs.push(Pair { keyword, value, shown: keyword.name != "password" });
    }
    Ok(())
}

fn percent_decode(text: &str, at: usize) -> Result<String, ConninfoError> {
    let bytes = text.as_bytes();
    let wrong =
        |i: usize| bytes[i] == b'%' && !(bytes.len() > i + 2 && bytes[i + 1..i + 3].iter().all(u8::is_ascii_hexdigit));
    if (0..bytes.len()).any(wrong) {
        return Err(syntax(at, "a \"%\" is not followed by two hexadecimal digits; write it as %25"));
    }
    let decoded = percent_encoding::percent_decode_str(text).decode_utf8();
    let decoded = decoded.map_err(|_| syntax(at, "the percent-encoded text is not UTF-8"))?;
    if decoded.contains('\0') {
        return Err(syntax(at, "%00 is not allowed"));
    }
    Ok(decoded.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(text: &str) -> Vec<(&'static str, String)> {
        parse(text).unwrap().into_iter().map(|pair| (pair.keyword.name, pair.value)).collect()
    }

    fn refused(text: &str) -> String {
        parse(text).map(|_| ()).unwrap_err().to_string()
    }

    #[track_caller]
    fn check(text: &str, expected: &[(&'static str, &str)]) {
        let expected: Vec<_> = expected.iter().map(|(k, v)| (*k, v.to_string())).collect();
        assert_eq!(pairs(text), expected, "{text}");
    }

    /// These and the URIs below were compared with `PQconninfoParse` of libpq 15.
    #[test]
    fn keywords_are_quoted_as_in_libpq() {
        check("", &[]);
        check(" \t\n", &[]);
        check("host=db port=1", &[("host", "db"), ("port", "1")]);
        check("host = db  port\n=\t1", &[("host", "db"), ("port", "1")]);
        check("user='a b'", &[("user", "a b")]);
        check(r"user='it\'s \\ fine'", &[("user", r"it's \ fine")]);
        check(r"user=a\ b\'c", &[("user", "a b'c")]);
        check("user=a'b'", &[("user", "a'b'")]);
        check("user='' port=1", &[("user", ""), ("port", "1")]);
        // Blanks behind "=" are skipped, so an empty unquoted value swallows the next word: libpq does the same.
        check("user= dbname=x", &[("user", "dbname=x")]);
        check("user=", &[("user", "")]);
        check(r"user=a\", &[("user", "a")]);
        check("user='a'port=1", &[("user", "a"), ("port", "1")]);
        check("options='-c a=b'", &[("options", "-c a=b")]);
    }

    #[test]
    fn keyword_mistakes_name_the_place() {
        assert_eq!(
            refused("host=db user"),
            "could not read the connection string at character 9: \
             the word that begins here is not followed by \"=\""
        );
        assert!(refused("user='a").contains("character 6"));
        assert!(refused(r"user='a\'").contains("does not end"));
        assert_eq!(refused("hots=db"), "unknown keyword \"hots\" in the connection string; did you mean \"host\"?");
        assert_eq!(refused("quux=db"), "unknown keyword \"quux\" in the connection string");
    }

    #[test]
    fn words_behind_a_password_are_not_repeated() {
        for text in ["password=open canary", "password=open canary=1", "postgres://u:p@h/?canary=1"] {
            assert!(!refused(text).contains("canary"), "{text}");
        }
        assert!(refused("password=x sslmod=require").ends_with("did you mean \"sslmode\"?"));
    }

    #[test]
    fn uris_are_read_as_in_libpq() {
        check("postgresql://", &[]);
        check("postgres://db", &[("host", "db")]);
        check("postgresql://db:5433", &[("host", "db"), ("port", "5433")]);
        check("postgresql://db/app", &[("host", "db"), ("dbname", "app")]);
        check("postgresql://u@db", &[("user", "u"), ("host", "db")]);
        check(
            "postgresql://u:pw@h1:1,h2:2/app?sslmode=require&application_name=x",
            &[
                ("user", "u"),
                ("password", "pw"),
                ("host", "h1,h2"),
                ("port", "1,2"),
                ("dbname", "app"),
                ("sslmode", "require"),
                ("application_name", "x"),
            ],
        );
        check("postgresql://h1,h2:2/", &[("host", "h1,h2"), ("port", ",2")]);
        check("postgresql://u:a%2Fb%40c%25@h", &[("user", "u"), ("password", "a/b@c%"), ("host", "h")]);
        check("postgresql://[2001:db8::1]:5433/x", &[("host", "2001:db8::1"), ("port", "5433"), ("dbname", "x")]);
        check("postgresql://[::1],h?port=7", &[("host", "::1,h"), ("port", ","), ("port", "7")]);
        check("postgresql://%2Fvar%2Frun/app", &[("host", "/var/run"), ("dbname", "app")]);
        check("postgresql:///app?host=/run&port=5", &[("dbname", "app"), ("host", "/run"), ("port", "5")]);
        check("postgresql://:5433/", &[("port", "5433")]);
        check("postgresql://u:p?w@h", &[("user", "u"), ("password", "p?w"), ("host", "h")]);
        check("postgresql://h?user=a%20b", &[("host", "h"), ("user", "a b")]);
        check("postgresql://h?ssl=true", &[("host", "h"), ("sslmode", "require")]);
        check("postgresql://u:p:q@h/a/b", &[("user", "u"), ("password", "p:q"), ("host", "h"), ("dbname", "a/b")]);
        check("postgresql://:pw@h/?", &[("password", "pw"), ("host", "h")]);
        check("postgresql://h?user=", &[("host", "h"), ("user", "")]);
        check("postgresql://h?user=a&", &[("host", "h"), ("user", "a")]);
    }

    #[test]
    fn uri_mistakes_are_refused_without_their_text() {
        for text in [
            "postgresql://u:can%ary@h",
            "postgresql://u:canary%00@h",
            "postgresql://u:canary%ff@h",
            "postgresql://u:x@canary@h/db",
            "postgresql://u:12/canary@h/db",
            "postgresql://[canary",
            "postgresql://[]/canary",
            "postgresql://[::1]canary",
            "postgresql://h?canary",
            "postgresql://h?user=a=canary",
            "host= password=canary",
            "user=' password = canary'",
            "host=postgresql://u:canary@h",
            "user=' password='canary' port=1",
        ] {
            assert!(!refused(text).contains("canary"), "{text}: {}", refused(text));
        }
    }
}
