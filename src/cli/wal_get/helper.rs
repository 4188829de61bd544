//! Owns: the process that fetches ahead: how the first request of a recovery starts it, how it detaches; the end of a
//! restore; what the words of a command line say before anything is parsed.
//! Does not own: what the helper does (`restore/prefetch`).
//!
//! PostgreSQL must not notice it: it has a session of its own, so that no signal to the server's processes reaches it,
//! and none of the files and pipes of the one that started it. Where the postmaster is process 1 of a container, the
//! helper becomes its child, and a child that ends with anything but 0 or 1 makes it restart all others.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use super::super::args::{Global, WalGetArgs};
use super::super::{Verdict, setup};
use crate::config::ArchiveConfig;
use crate::error::{ExitCode, Failure};
use crate::repository::durable::Directory;
use crate::repository::layout;
use crate::restore::marker::{self, RestoreId, RestoreMarker};
use crate::restore::prefetch::{self, Options, Place, pin};
use crate::restore::wal_get::{Holder, WalGet};
use crate::wal::SegmentName;

const RESTORE: &str = "--restore";
const PREFETCH: &str = "--prefetch";
const RESTORE_END: &str = "--restore-end";

// --- The words of a command line -----------------------------------------------------------------------------------

/// The first word that is a name PostgreSQL asks for; its destination follows.
pub fn name_at(arguments: &[OsString]) -> Option<usize> {
    let is_name = |word: &OsString| {
        let word = word.to_str().unwrap_or_default();
        word.parse::<SegmentName>().is_ok() || layout::parse_history(word).is_some()
    };
    arguments.iter().position(is_name)
}

pub fn restore_id(arguments: &[OsString]) -> Option<RestoreId> {
    value_of(arguments, RESTORE)?.to_str()?.parse().ok()
}

/// The value of `--option VALUE` or `--option=VALUE`.
fn value_of<'a>(arguments: &'a [OsString], option: &str) -> Option<&'a OsStr> {
    arguments.iter().enumerate().find_map(|(at, word)| match word.to_str()?.strip_prefix(option)? {
        "" => arguments.get(at + 1).map(OsString::as_os_str),
        rest => rest.strip_prefix('=').map(OsStr::new),
    })
}

/// The command line of the helper: without what was asked for.
pub fn is_helper(arguments: &[OsString]) -> bool {
    name_at(arguments).is_none() && arguments.iter().any(|word| word == PREFETCH)
}

/// The command line of a `recovery_end_command`.
pub fn ends_restore(arguments: &[OsString]) -> bool {
    name_at(arguments).is_none() && value_of(arguments, RESTORE_END).is_some()
}

// --- The process ---------------------------------------------------------------------------------------------------

/// Starts a helper if there is none. Without one everything goes on, only slower.
pub fn start(id: RestoreId, name: &str) {
    let place = Place::of(id);
    if prefetch::is_there(&place) {
        return;
    }
    if let Err(error) = spawn(&place, name) {
        tracing::warn!("could not start fetching ahead in {}: {error}", place.path().display());
    }
}

fn spawn(place: &Place, name: &str) -> io::Result<()> {
    let mut arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let Some(at) = name_at(&arguments) else { return Ok(()) };
    arguments.drain(at..arguments.len().min(at + 2));
    arguments.push(PREFETCH.into());
    if name.parse::<SegmentName>().is_ok() {
        arguments.push(format!("--from={name}").into());
    }
    place.create()?;
    let log = File::options().create(true).append(true).mode(0o600).open(place.log())?;
    // Nothing the server has open is kept open by a process that outlives this one.
    close_fds::set_fds_cloexec(3, &[]);
    let mut helper = Command::new(std::env::current_exe()?);
    helper.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    helper.spawn().map(drop)
}

/// The helper itself.
pub fn run(config: &ArchiveConfig, args: &WalGetArgs, marker: Option<RestoreMarker>) -> Result<Verdict, Failure> {
    let Some(marker) = marker else {
        return Err(Failure::new(ExitCode::Usage, format!("no such restore has left its {}", marker::FILE_NAME))
            .hint("wal-get starts this by itself; it is not meant to be run by hand"));
    };
    // A group leader cannot: it was started by hand, and may stay where it is.
    let _ = rustix::process::setsid();
    let place = Place::of(marker.id);
    let wal_get = super::of_restore(config, &marker)?;
    let holders = wal_get.holders.into_iter().map(Holder::remembering).collect();
    let wal_get = WalGet { holders, ..wal_get };
    let options = Options { marker, wal_get, limit_bytes: args.ahead, from: args.from };
    let ended =
        setup::block_on_threads(setup::threads_for_roots(1), prefetch::run(options, place))?.map_err(|error| {
            Failure::new(ExitCode::Unavailable, format!("could not fetch ahead: {error}"))
                .hint("is there room in pg_wal, and may this user write there?")
        })?;
    tracing::info!(?ended, "nobody needs what would be fetched ahead");
    Ok(Verdict::Fine)
}

// --- The end of a restore ------------------------------------------------------------------------------------------

/// Removes what a restore has left. The server is up by now: nothing here is worth stopping it.
pub fn end_restore(global: &Global, id: RestoreId) {
    let marker = match RestoreMarker::read(Path::new(".")) {
        Ok(marker) => marker.filter(|marker| marker.id == id),
        Err(error) => {
            tracing::warn!("{error}");
            None
        }
    };
    if marker.is_some()
        && let Err(error) = Directory::open(Path::new(".")).and_then(|here| here.remove_files(&[marker::FILE_NAME]))
    {
        tracing::warn!("could not remove {}, which says nothing to anybody any more: {error}", marker::FILE_NAME);
    }
    let place = Place::of(id);
    prefetch::end(&place);
    if let Err(error) = place.remove_all() {
        tracing::warn!("could not remove {}: {error}", place.path().display());
    }
    let Some(marker) = marker.filter(|marker| marker.pinned) else { return };
    if let Err(failure) = release_pin(global, &marker) {
        tracing::warn!(
            hint = failure.hint,
            "could not lift the pin of restore {id}, which lapses by itself: {failure}"
        );
    }
}

fn release_pin(global: &Global, marker: &RestoreMarker) -> Result<(), Failure> {
    let config = super::config(global, Some(marker))?;
    let wal_get = super::of_restore(&config, marker)?;
    setup::block_on(pin::release(&wal_get.holders, marker.id))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<OsString> {
        line.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn a_request_is_recognised_wherever_its_words_stand() {
        const SEGMENT: &str = "000000010000000000000003";
        for line in [
            format!("seawall wal-get --restore 000000000000beef {SEGMENT} pg_wal/RECOVERYXLOG"),
            format!("seawall --config a wal-get {SEGMENT} pg_wal/RECOVERYXLOG --restore=000000000000beef -v"),
        ] {
            let words = words(&line);
            let at = name_at(&words).unwrap();
            assert_eq!((&words[at], &words[at + 1]), (&SEGMENT.into(), &"pg_wal/RECOVERYXLOG".into()));
            assert_eq!(restore_id(&words), Some(RestoreId(0xBEEF)));
            assert!(!is_helper(&words) && !ends_restore(&words));
        }
        assert!(name_at(&words("seawall wal-get --restore 000000000000beef 00000002.history x")).is_some());
        for line in ["seawall wal-get", "seawall wal-get --restore", "seawall wal-get --restore beef"] {
            assert_eq!((name_at(&words(line)), restore_id(&words(line))), (None, None), "{line}");
        }
    }

    #[test]
    fn nobody_who_asks_for_wal_gets_the_codes_of_another() {
        let id = "000000000000beef";
        assert!(is_helper(&words(&format!(
            "seawall wal-get --restore {id} --prefetch --from=000000010000000000000003"
        ))));
        assert!(!is_helper(&words(&format!("seawall wal-get --restore {id} --prefetch 000000010000000000000003 x"))));
        assert!(ends_restore(&words(&format!("seawall wal-get --restore-end {id}"))));
        assert!(!ends_restore(&words(&format!("seawall wal-get --restore-end {id} 00000002.history x"))));
        assert_eq!(restore_id(&words(&format!("seawall wal-get --restore-end {id}"))), None);
    }
}
