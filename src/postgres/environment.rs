//! Owns: what is asked of the process' surroundings (variables, home, user, small files), so that tests can invent them.
//! Does not own: what the answers mean.

use std::fmt;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Configuration, service and password files are a few KiB; more than this is some other file.
/// Larger would only delay the error, smaller could refuse a generated passfile of a big site.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// The surroundings libpq looks at.
pub trait Environment: Send + Sync {
    /// A variable's value; bytes that are not UTF-8 are replaced, so that a setting is never ignored silently.
    fn var(&self, name: &str) -> Option<String>;
    /// All variables whose name begins with `prefix`, sorted.
    fn vars(&self, prefix: &str) -> Vec<(String, String)>;
    fn home(&self) -> Option<PathBuf>;
    /// The name of the user this process runs as.
    fn os_user(&self) -> Option<String>;
    /// The content and mode of a plain file; anything else (directory, pipe) is `InvalidInput`.
    fn read(&self, path: &Path) -> io::Result<FileContent>;
    fn is_directory(&self, path: &Path) -> bool;
}

/// A small file as it was found. `Debug` does not show the bytes: they may hold passwords.
#[derive(Clone, PartialEq, Eq)]
pub struct FileContent {
    pub bytes: Vec<u8>,
    /// Permission bits, without the file type.
    pub mode: u32,
}

impl FileContent {
    pub fn text(&self) -> Result<&str, std::str::Utf8Error> {
        std::str::from_utf8(&self.bytes)
    }
}

impl fmt::Debug for FileContent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FileContent {{ {} bytes, mode {:04o} }}", self.bytes.len(), self.mode)
    }
}

/// The real one.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemEnvironment;

impl Environment for SystemEnvironment {
    fn var(&self, name: &str) -> Option<String> {
        std::env::var_os(name).map(|value| value.to_string_lossy().into_owned())
    }

    fn vars(&self, prefix: &str) -> Vec<(String, String)> {
        let text = |s: std::ffi::OsString| s.to_string_lossy().into_owned();
        let mut found: Vec<_> = std::env::vars_os()
            .map(|(name, value)| (text(name), text(value)))
            .filter(|(name, _)| name.starts_with(prefix))
            .collect();
        found.sort();
        found
    }

    fn home(&self) -> Option<PathBuf> {
        let named = std::env::var_os("HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
        named.or_else(|| passwd_entry().map(|(_, home)| home))
    }

    /// From `/etc/passwd`, without NSS: users of a directory service are found by `USER`, which logins set.
    fn os_user(&self) -> Option<String> {
        let named = passwd_entry().map(|(user, _)| user);
        named.or_else(|| self.var("USER").filter(|user| !user.is_empty()))
    }

    fn read(&self, path: &Path) -> io::Result<FileContent> {
        // Looked at before opening: opening a pipe without a writer would wait forever.
        if !std::fs::metadata(path)?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a plain file"));
        }
        let file = std::fs::File::open(path)?;
        let mode = file.metadata()?.permissions().mode() & 0o7777;
        let mut bytes = Vec::new();
        file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > FILE_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "larger than 4 MiB"));
        }
        Ok(FileContent { bytes, mode })
    }

    fn is_directory(&self, path: &Path) -> bool {
        path.is_dir()
    }
}

/// Name and home directory of the effective user.
fn passwd_entry() -> Option<(String, PathBuf)> {
    let uid = rustix::process::geteuid().as_raw().to_string();
    let text = std::fs::read("/etc/passwd").ok()?;
    passwd_line(&String::from_utf8_lossy(&text), &uid)
}

fn passwd_line(text: &str, uid: &str) -> Option<(String, PathBuf)> {
    text.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        (fields.len() >= 6 && fields[2] == uid).then(|| (fields[0].to_string(), PathBuf::from(fields[5])))
    })
}

/// An invented one: no variables, home `/home/tester`, user `tester`, no files.
#[cfg(test)]
#[derive(Clone, Debug)]
pub(crate) struct MemoryEnvironment {
    vars: std::collections::BTreeMap<String, String>,
    files: std::collections::BTreeMap<PathBuf, FileContent>,
    directories: Vec<PathBuf>,
    unreadable: Vec<PathBuf>,
    user: Option<String>,
}

#[cfg(test)]
impl MemoryEnvironment {
    pub(crate) fn new() -> MemoryEnvironment {
        MemoryEnvironment {
            vars: Default::default(),
            files: Default::default(),
            directories: Vec::new(),
            unreadable: Vec::new(),
            user: Some("tester".to_string()),
        }
    }

    pub(crate) fn with_var(mut self, name: &str, value: &str) -> Self {
        self.vars.insert(name.to_string(), value.to_string());
        self
    }

    pub(crate) fn with_file(mut self, path: &str, mode: u32, text: &str) -> Self {
        self.files.insert(PathBuf::from(path), FileContent { bytes: text.as_bytes().to_vec(), mode });
        self
    }

    pub(crate) fn with_unreadable(mut self, path: &str) -> Self {
        self.unreadable.push(PathBuf::from(path));
        self
    }

    pub(crate) fn with_directory(mut self, path: &str) -> Self {
        self.directories.push(PathBuf::from(path));
        self
    }

    pub(crate) fn without_user(mut self) -> Self {
        self.user = None;
        self
    }
}

#[cfg(test)]
impl Environment for MemoryEnvironment {
    fn var(&self, name: &str) -> Option<String> {
        self.vars.get(name).cloned()
    }

    fn vars(&self, prefix: &str) -> Vec<(String, String)> {
        self.vars.iter().filter(|(n, _)| n.starts_with(prefix)).map(|(n, v)| (n.clone(), v.clone())).collect()
    }

    fn home(&self) -> Option<PathBuf> {
        Some(PathBuf::from("/home/tester"))
    }

    fn os_user(&self) -> Option<String> {
        self.user.clone()
    }

    fn read(&self, path: &Path) -> io::Result<FileContent> {
        if self.unreadable.iter().any(|p| p == path) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        if self.is_directory(path) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a plain file"));
        }
        self.files.get(path).cloned().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn is_directory(&self, path: &Path) -> bool {
        self.directories.iter().any(|p| p == path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwd_is_matched_by_uid() {
        let text = "root:x:0:0:root:/root:/bin/bash\npostgres:x:105:110:,,,:/var/lib/postgresql:/bin/bash\nbroken\n";
        assert_eq!(passwd_line(text, "105"), Some(("postgres".into(), "/var/lib/postgresql".into())));
        assert_eq!(passwd_line(text, "10"), None);
    }

    #[test]
    fn system_reads_plain_files_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "x").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        let content = SystemEnvironment.read(&path).unwrap();
        assert_eq!((content.bytes.as_slice(), content.mode), (&b"x"[..], 0o640));
        assert_eq!(SystemEnvironment.read(dir.path()).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(SystemEnvironment.read(&dir.path().join("no")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
