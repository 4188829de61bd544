//! Owns: finding a PostgreSQL installation that can play the demonstration's part, and the user it runs as.
//! Does not own: running anything but `postgres --version` (`scene.rs`).

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::{ExitCode, Failure};

/// Everything the demonstration calls.
const TOOLS: [&str; 6] = ["initdb", "pg_ctl", "postgres", "psql", "pg_basebackup", "pgbench"];
/// Names this directory instead of searching.
const BIN_VARIABLE: &str = "SEAWALL_PG_BIN";
const MAJORS: std::ops::RangeInclusive<u32> = 13..=18;

/// Who servers, agent and tools run as: PostgreSQL refuses to be root.
#[derive(Clone, Copy, Debug)]
pub enum ServiceUser {
    Ourselves,
    Other { uid: u32, gid: u32 },
}

impl ServiceUser {
    /// For root: `postgres`, or another user without rights.
    pub fn find() -> Result<ServiceUser, Failure> {
        if !rustix::process::geteuid().is_root() {
            return Ok(ServiceUser::Ourselves);
        }
        let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
        let found = ["postgres", "seawall-test", "nobody"].into_iter().find_map(|name| entry(&passwd, name));
        found.map(|(uid, gid)| ServiceUser::Other { uid, gid }).ok_or_else(|| {
            Failure::new(ExitCode::Permission, "PostgreSQL refuses to run as root, and there is no user postgres here")
                .hint("run the demonstration as an ordinary user")
        })
    }

    pub fn become_in(self, command: &mut Command) {
        if let ServiceUser::Other { uid, gid } = self {
            command.uid(uid).gid(gid);
        }
    }
}

fn entry(passwd: &str, name: &str) -> Option<(u32, u32)> {
    let mut entries = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let fields = entries.find(|fields| fields.len() > 3 && fields[0] == name)?;
    Some((fields[2].parse().ok()?, fields[3].parse().ok()?))
}

/// One directory with all [`TOOLS`].
#[derive(Clone, Debug)]
pub struct Installation {
    pub bin: PathBuf,
    /// "18.4".
    pub version: String,
}

impl Installation {
    /// The newest complete one: named, installed for the tests, the distribution's, or in PATH.
    pub fn find(user: ServiceUser) -> Result<Installation, Failure> {
        let mut refused = Vec::new();
        let mut found = Vec::new();
        for bin in places() {
            match Installation::examine(bin, user) {
                Ok(installation) => found.push(installation),
                Err(why) => refused.push(why),
            }
        }
        let newest = found.into_iter().max_by_key(Installation::numbers);
        newest.ok_or_else(|| {
            let seen = if refused.is_empty() { String::new() } else { format!(": {}", refused.join("; ")) };
            Failure::new(ExitCode::Unavailable, format!("no complete PostgreSQL 13 to 18 found{seen}")).hint(format!(
                "`make demo` installs one beside the build; or name a directory that holds {} in {BIN_VARIABLE}",
                TOOLS.join(", ")
            ))
        })
    }

    fn examine(bin: PathBuf, user: ServiceUser) -> Result<Installation, String> {
        let lacking: Vec<&str> = TOOLS.into_iter().filter(|tool| !bin.join(tool).exists()).collect();
        if !lacking.is_empty() {
            return Err(format!("{} lacks {}", bin.display(), lacking.join(", ")));
        }
        let mut installation = Installation { bin, version: String::new() };
        let mut asking = installation.command("postgres");
        user.become_in(asking.arg("--version").current_dir("/").stdin(Stdio::null()).stderr(Stdio::null()));
        let place = installation.bin.display().to_string();
        let answer = asking.output().map_err(|error| format!("{place}/postgres does not run: {error}"))?;
        let text = String::from_utf8_lossy(&answer.stdout).into_owned();
        let version = text.split_whitespace().nth(2).filter(|_| answer.status.success());
        installation.version = version.ok_or_else(|| format!("{place}/postgres does not run"))?.to_string();
        match MAJORS.contains(&installation.numbers().0) {
            true => Ok(installation),
            false => Err(format!("{place} is PostgreSQL {}", installation.version)),
        }
    }

    fn numbers(&self) -> (u32, u32) {
        let mut numbers = self.version.split(|c: char| !c.is_ascii_digit()).map(|digits| digits.parse().unwrap_or(0));
        (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
    }

    /// One of its programs, free of the caller's own PostgreSQL and Seawall settings.
    pub fn command(&self, tool: &str) -> Command {
        let mut command = Command::new(self.bin.join(tool));
        without_settings(&mut command).env("LC_ALL", "C");
        if let Some(library) = self.library() {
            command.env("LD_LIBRARY_PATH", library);
        }
        command
    }

    /// A relocated installation brings its libraries along.
    pub fn library(&self) -> Option<PathBuf> {
        let library = self.bin.parent()?.join("lib");
        (!self.bin.starts_with("/usr") && library.is_dir()).then_some(library)
    }
}

/// Removes `PG*`, `SEAWALL*` and `RUST_LOG`: what the caller has set for other servers is not meant here.
pub fn without_settings(command: &mut Command) -> &mut Command {
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("PG") || text.starts_with("SEAWALL") || text == "RUST_LOG" {
            command.env_remove(&name);
        }
    }
    command.env_remove("NOTIFY_SOCKET")
}

/// Directories that may hold the programs.
fn places() -> Vec<PathBuf> {
    if let Some(named) = std::env::var_os(BIN_VARIABLE) {
        return vec![PathBuf::from(named)];
    }
    // Where tests/servers/install puts them: beside the build this program comes from, or below the checkout.
    let built = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.parent()?.join("servers")));
    let mut places: Vec<PathBuf> = built.iter().flat_map(|servers| versions_below(servers)).collect();
    places.extend(versions_below(Path::new("target/servers")));
    places.extend(versions_below(Path::new("/usr/lib/postgresql")));
    let path = std::env::var_os("PATH").unwrap_or_default();
    places.extend(std::env::split_paths(&path).filter(|directory| directory.join("postgres").exists()));
    let mut seen = std::collections::BTreeSet::new();
    let resolved = places.into_iter().filter_map(|place| place.canonicalize().ok());
    resolved.filter(|place| seen.insert(place.clone())).collect()
}

fn versions_below(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.path().join("bin")).filter(|bin| bin.is_dir()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_as_numbers() {
        let of = |version: &str| Installation { bin: PathBuf::new(), version: version.to_string() }.numbers();
        assert!(of("18.4") > of("9.6.24") && of("13.23") > of("13.4") && of("15.20 (Debian 15.20-0)") > of("15.3"));
        assert_eq!(of("19beta2").0, 19);
    }

    #[test]
    fn a_user_is_found_by_its_whole_name() {
        let passwd = "root:x:0:0::/:/bin/sh\npostgres2:x:7:8::/:\npostgres:x:101:104:PostgreSQL:/:/bin/bash\n";
        assert_eq!(entry(passwd, "postgres"), Some((101, 104)));
        assert_eq!(entry(passwd, "nobody"), None);
    }
}
