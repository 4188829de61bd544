//! Owns: reading the file of age identities, as strict about who may read it as libpq about a client's key.
//! Does not own: what they decrypt (`codec::encrypt`), which objects need them.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::codec::encrypt::{Identities, Keys};
use crate::error::{ExitCode, Failure};

/// A larger file holds something else.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// What reads the objects of a cluster.
pub fn reading(identity_file: Option<&Path>) -> Result<Keys, Failure> {
    let identities = identity_file.map(read_identities).transpose()?;
    Ok(Keys { recipients: None, identities })
}

/// The identities of a file. Refused when everybody may read it; its group may, because that is how secrets are
/// mounted into containers.
pub fn read_identities(path: &Path) -> Result<Identities, Failure> {
    let place = path.display();
    let unreadable = |error: std::io::Error| {
        let code = match error.kind() {
            std::io::ErrorKind::PermissionDenied => ExitCode::Permission,
            _ => ExitCode::Config,
        };
        Failure::new(code, format!("could not read identity_file {place}: {error}")).hint(
            "it holds the AGE-SECRET-KEY-1… that reads the archive; is the path right, and may this user read it?",
        )
    };
    let file = File::open(path).map_err(unreadable)?;
    let found = file.metadata().map_err(unreadable)?;
    if !found.is_file() {
        return Err(Failure::new(ExitCode::Config, format!("identity_file {place} is not a file"))
            .hint("name a file as age-keygen writes it"));
    }
    if found.mode() & 0o007 != 0 {
        let message = format!("identity_file {place} is open to everybody (mode {:04o})", found.mode() & 0o7777);
        return Err(Failure::new(ExitCode::Config, message).hint(format!("chmod 0600 {place}")));
    }
    if found.len() > FILE_BYTES_MAX {
        let message = format!("identity_file {place} is {} bytes long: it holds something else", found.len());
        return Err(Failure::new(ExitCode::Config, message).hint("name a file as age-keygen writes it"));
    }
    let mut content = Vec::new();
    file.take(FILE_BYTES_MAX).read_to_end(&mut content).map_err(unreadable)?;
    Identities::parse(&content).map_err(|fault| {
        Failure::new(ExitCode::Config, format!("identity_file {place} cannot be used: {fault}"))
            .hint("name a file as age-keygen writes it")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    const IDENTITY: &str = "AGE-SECRET-KEY-1GFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPQ4EGAEX\n";

    fn with(content: &str, mode: u32) -> Result<Identities, Failure> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key.txt");
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        read_identities(&path)
    }

    #[test]
    fn an_identity_file_everybody_may_read_is_refused() {
        let content = format!("# created: today\n{IDENTITY}");
        for mode in [0o600, 0o400, 0o640, 0o440] {
            assert_eq!(with(&content, mode).unwrap().public_keys().len(), 1, "{mode:o}");
        }
        for mode in [0o644, 0o604, 0o602] {
            let failure = with(&content, mode).unwrap_err();
            assert!(failure.message.contains("open to everybody") && failure.hint.unwrap().contains("chmod 0600"));
        }
    }

    #[test]
    fn errors_name_the_file_and_never_what_it_holds() {
        let failure = with("AGE-SECRET-KEY-1GFPYYSJZ\n", 0o600).unwrap_err();
        assert!(failure.message.contains("key.txt cannot be used: line 1"), "{failure}");
        assert!(!failure.message.contains("GFPYYSJZ"), "{failure}");
        assert!(with("# nothing\n", 0o600).unwrap_err().message.contains("holds no identity"));
        let missing = read_identities(Path::new("/no/such/file")).unwrap_err();
        assert_eq!(missing.exit_code, ExitCode::Config);
        assert!(read_identities(Path::new("/")).unwrap_err().message.contains("is not a file"));
    }
}
