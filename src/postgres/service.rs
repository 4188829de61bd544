//! Owns: connection service files: where they are, and what a section says.
//! Does not own: precedence (`conninfo`).

use std::path::{Path, PathBuf};

use super::environment::Environment;
use super::error::{ConninfoError, Origin};
use super::keywords::{self, Keyword};

/// Where Debian's libpq looks when `PGSYSCONFDIR` is not set.
const SYSTEM_DIRECTORY: &str = "/etc/postgresql-common";

/// A service's settings; of a repeated one the first counts, unlike in connection strings.
pub(super) struct Service {
    pub path: PathBuf,
    pub settings: Vec<(&'static Keyword, String)>,
}

/// Looks in the user's file first, then in the system's. `file` is what `servicefile` or `PGSERVICEFILE` says.
pub(super) fn find(name: &str, file: Option<&str>, environment: &dyn Environment) -> Result<Service, ConninfoError> {
    let mut searched = Vec::new();
    for (path, required) in candidates(file, environment) {
        let Some(text) = read(&path, required, environment)? else { continue };
        if let Some(settings) = section(&text, name, &path)? {
            return Ok(Service { path, settings });
        }
        searched.push(path);
    }
    Err(ConninfoError::NoService { name: name.to_string(), searched })
}

/// The files in order; a file that was named must exist.
fn candidates(file: Option<&str>, environment: &dyn Environment) -> Vec<(PathBuf, bool)> {
    let named = file.filter(|file| !file.is_empty()).map(|file| (PathBuf::from(file), true));
    let own = named.or_else(|| environment.home().map(|home| (home.join(".pg_service.conf"), false)));
    let system = environment.var("PGSYSCONFDIR").unwrap_or_else(|| SYSTEM_DIRECTORY.to_string());
    own.into_iter().chain([(Path::new(&system).join("pg_service.conf"), false)]).collect()
}

fn read(path: &Path, required: bool, environment: &dyn Environment) -> Result<Option<String>, ConninfoError> {
    let failed = |cause: String, permission| ConninfoError::ReadFile {
        what: "service file",
        path: path.to_path_buf(),
        cause,
        permission,
    };
    match environment.read(path) {
        Ok(content) => {
            let text = content.text().map_err(|_| failed("not UTF-8".to_string(), false))?;
            Ok(Some(text.to_string()))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && !required => Ok(None),
        Err(error) => Err(failed(error.to_string(), error.kind() == std::io::ErrorKind::PermissionDenied)),
    }
}

/// The settings of `[name]`, or `None` without such a section. Other sections are not looked into.
fn section(text: &str, name: &str, path: &Path) -> Result<Option<Vec<(&'static Keyword, String)>>, ConninfoError> {
    let mut found: Option<Vec<(&'static Keyword, String)>> = None;
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(head) = line.strip_prefix('[') {
            if found.is_some() {
                break;
            }
            found = (head.strip_suffix(']') == Some(name)).then(Vec::new);
        } else if let Some(settings) = &mut found {
            let (keyword, value) = setting(line, index + 1, name, path)?;
            if settings.iter().all(|(known, _)| known.name != keyword.name) {
                settings.push((keyword, value));
            }
        }
    }
    Ok(found)
}

fn setting(line: &str, number: usize, service: &str, path: &Path) -> Result<(&'static Keyword, String), ConninfoError> {
    let wrong = |problem| ConninfoError::ServiceSyntax { path: path.to_path_buf(), line: number, problem };
    if line.starts_with("ldap") {
        return Err(wrong("LDAP look-up is not available in this version"));
    }
    let (name, value) = line.split_once('=').ok_or_else(|| wrong("there is no \"=\""))?;
    if name == "service" || name == "servicefile" {
        return Err(wrong("a service cannot refer to another service"));
    }
    if value.contains('\0') {
        return Err(wrong("it contains a NUL character"));
    }
    let keyword = keywords::find(name).ok_or_else(|| ConninfoError::UnknownKeyword {
        origin: Origin::Service { name: service.to_string(), path: path.to_path_buf() },
        keyword: Some(name.to_string()),
        nearest: keywords::nearest(name),
    })?;
    Ok((keyword, value.to_string()))
}

#[cfg(test)]
mod tests {
    use super::super::environment::MemoryEnvironment;
    use super::*;

    fn settings(service: &Service) -> Vec<(&'static str, &str)> {
        service.settings.iter().map(|(keyword, value)| (keyword.name, value.as_str())).collect()
    }

    const FILE: &str =
        "# comment\n[other]\nhost=no\nnonsense\n\n[main]\nhost=db1\n  port=5433  \nhost=db2\n[later]\nhost=x\n";

    #[test]
    fn section_is_found_and_ends_at_the_next() {
        let environment = MemoryEnvironment::new().with_file("/home/tester/.pg_service.conf", 0o600, FILE);
        let service = find("main", None, &environment).map_err(|e| e.to_string()).ok().unwrap();
        assert_eq!(settings(&service), [("host", "db1"), ("port", "5433")]);
        assert_eq!(service.path, Path::new("/home/tester/.pg_service.conf"));
    }

    #[test]
    fn files_are_searched_in_libpq_order() {
        let environment = MemoryEnvironment::new()
            .with_file("/home/tester/.pg_service.conf", 0o600, "[a]\nhost=home\n")
            .with_file("/named", 0o600, "[b]\nhost=named\n")
            .with_file("/etc/postgresql-common/pg_service.conf", 0o644, "[a]\nhost=system\n[c]\nhost=system\n");
        let host = |name, file| find(name, file, &environment).map(|s| s.settings[0].1.clone());
        assert_eq!(host("a", None), Ok("home".to_string()));
        assert_eq!(host("c", None), Ok("system".to_string()));
        assert_eq!(host("b", Some("/named")), Ok("named".to_string()));
        assert_eq!(host("a", Some("/named")), Ok("system".to_string()));
        assert!(matches!(host("b", None), Err(ConninfoError::NoService { searched, .. }) if searched.len() == 2));
        assert!(matches!(host("a", Some("/missing")), Err(ConninfoError::ReadFile { permission: false, .. })));
        let moved = environment.clone().with_var("PGSYSCONFDIR", "/conf").with_file(
            "/conf/pg_service.conf",
            0o644,
            "[c]\nhost=moved\n",
        );
        assert_eq!(find("c", None, &moved).ok().unwrap().settings[0].1, "moved");
    }

    #[test]
    fn mistakes_name_file_and_line_but_no_text() {
        for line in ["password canary", "ldap://canary", "service=canary"] {
            let environment = MemoryEnvironment::new().with_file("/s", 0o600, &format!("[x]\n{line}\n"));
            let error = find("x", Some("/s"), &environment).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains("/s line 2") && !error.contains("canary"), "{error}");
        }
        let environment = MemoryEnvironment::new().with_file("/s", 0o600, "[x]\npasswrd=canary\n");
        let error = find("x", Some("/s"), &environment).map(|_| ()).unwrap_err().to_string();
        assert_eq!(error, "unknown keyword \"passwrd\" in service x in /s; did you mean \"password\"?");
    }
}
