//! Owns: users and groups by name, for `--owner` and for the command that starts the copy.
//! Does not own: who owns what (`ground.rs`).

use std::process::Command;

use super::error::RestoreError;

/// `postgres`, `postgres:dba`, `26:26`: a user, and a group where it is not the user's own.
pub fn parse_owner(text: &str) -> Result<(u32, u32), RestoreError> {
    let fault = |fault: String| RestoreError::Usage { option: "--owner", value: text.to_string(), fault };
    let (user, group) = text.split_once(':').map_or((text, None), |(user, group)| (user, Some(group)));
    let uid =
        user.parse().ok().or_else(|| asked("-u", user)).ok_or_else(|| fault(format!("there is no user {user:?}")))?;
    let gid = match group {
        Some(group) => group.parse().ok().or_else(|| group_of(group)),
        None => asked("-g", user),
    };
    gid.map(|gid| (uid, gid)).ok_or_else(|| fault("its group is not known: write it as USER:GROUP".to_string()))
}

/// As the system knows users, wherever it keeps them.
fn asked(option: &str, user: &str) -> Option<u32> {
    if user.is_empty() || user.starts_with('-') {
        return None;
    }
    let answer = Command::new("id").args([option, user]).output().ok().filter(|answer| answer.status.success())?;
    String::from_utf8(answer.stdout).ok()?.trim().parse().ok()
}

fn group_of(name: &str) -> Option<u32> {
    field(&std::fs::read_to_string("/etc/group").ok()?, 0, name, 2)?.parse().ok()
}

/// The name of a user this system has.
pub fn name_of(uid: u32) -> Option<String> {
    let passwd = std::fs::read_to_string("/etc/passwd").ok()?;
    field(&passwd, 2, &uid.to_string(), 0).map(str::to_string)
}

/// Field `wanted` of the line whose field `key` is `value`.
fn field<'a>(text: &'a str, key: usize, value: &str, wanted: usize) -> Option<&'a str> {
    let line = text.lines().find(|line| line.split(':').nth(key) == Some(value))?;
    line.split(':').nth(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_known_by_name_and_number() {
        assert_eq!(parse_owner("root").unwrap(), (0, 0));
        assert_eq!(parse_owner("26:27").unwrap(), (26, 27));
        assert_eq!(parse_owner("0").unwrap(), (0, 0));
        for wrong in ["", "-x", "nobody-of-this-name", "root:no-such-group"] {
            parse_owner(wrong).unwrap_err();
        }
        assert_eq!((name_of(0).as_deref(), name_of(3_999_999_999)), (Some("root"), None));
    }
}
