//! The command line: parse, run one verb, print its answer or its error, end with a documented code.
//!
//! Owns: the way from arguments to an exit code; panics; the rule that no code of `wal-get` may mislead PostgreSQL.
//! Does not own: what a verb does (one file each), how answers look (`output.rs`), what can be typed (`args.rs`).
//!
//! Data goes to standard output, words to standard error.

mod args;
mod backup;
mod check;
mod demo;
mod expire;
mod find;
mod gaps;
mod init;
mod keys;
mod list;
mod output;
mod pin;
mod progress;
mod repositories;
mod restorable;
mod restore;
mod run;
mod server;
mod setup;
mod status;
mod verify;
mod wal_get;
mod window;

use std::ffi::OsString;
use std::process;

use clap::Parser;
use clap::error::ErrorKind;

use crate::error::{ExitCode, Failure};
use crate::restore::wal_get::ERROR_EXIT_CODE;
use crate::telemetry;
use args::{Cli, Command};

/// The word that puts a command line under the contract of `restore_command`, wherever it stands.
const WAL_GET: &str = "wal-get";

/// What a verb came to, when it did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Fine,
    /// Gaps, faults, something not protected; for `wal-get`: proven absent.
    Finding,
}

impl Verdict {
    fn code(self) -> u8 {
        match self {
            Verdict::Fine => ExitCode::Success as u8,
            Verdict::Finding => ExitCode::Finding as u8,
        }
    }
}

/// Runs the command line and says what the process ends with.
pub fn main(arguments: Vec<OsString>) -> process::ExitCode {
    let contract = Contract::of(&arguments);
    end_on_panic(contract.of_panic());
    if contract == Contract::RestoreCommand
        && let Some(verdict) = wal_get::at_once(&arguments)
    {
        return process::ExitCode::from(verdict.code());
    }
    let (code, answers_wal_get) = match Cli::try_parse_from(&arguments) {
        Ok(cli) => (run(&cli, contract), matches!(cli.command, Command::WalGet(_))),
        Err(error) => (explain_usage(&error, &arguments), false),
    };
    process::ExitCode::from(match contract {
        Contract::RestoreCommand => harmless(code, answers_wal_get, asks_for_wal(&arguments)),
        Contract::Helper => code.min(1),
        Contract::RecoveryEndCommand | Contract::Documented => code,
    })
}

/// Who is told by the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Contract {
    /// PostgreSQL takes 1 to 125 for "end of WAL": `wal-get` wherever it stands.
    RestoreCommand,
    /// PostgreSQL warns, but for codes above 128, which stop it as a signal would.
    RecoveryEndCommand,
    /// A postmaster that is process 1 has it for a child, and takes all codes but 0 and 1 for a crash.
    Helper,
    /// People and scripts: the documented codes.
    Documented,
}

impl Contract {
    fn of(arguments: &[OsString]) -> Contract {
        match arguments.iter().any(|argument| argument == WAL_GET) {
            false => Contract::Documented,
            true if wal_get::helper::is_helper(arguments) => Contract::Helper,
            true if wal_get::helper::ends_restore(arguments) => Contract::RecoveryEndCommand,
            true => Contract::RestoreCommand,
        }
    }

    fn of_panic(self) -> u8 {
        match self {
            Contract::RestoreCommand => ERROR_EXIT_CODE,
            Contract::Helper => ExitCode::Finding as u8,
            Contract::RecoveryEndCommand | Contract::Documented => ExitCode::Internal as u8,
        }
    }
}

/// PostgreSQL takes 1 to 125 for "end of WAL" and promotes: only a proven absence may be 1. Neither may 0 be
/// anything but a delivered file: the help is a success only for somebody who asked for nothing else.
fn harmless(code: u8, answers_wal_get: bool, asks_for_wal: bool) -> u8 {
    match code {
        0 if answers_wal_get || !asks_for_wal => 0,
        1 if answers_wal_get => 1,
        _ => ERROR_EXIT_CODE,
    }
}

/// Whether any argument begins as every name PostgreSQL asks for does: with a timeline in eight digits.
fn asks_for_wal(arguments: &[OsString]) -> bool {
    let begins = |argument: &OsString| {
        argument.as_encoded_bytes().first_chunk::<8>().is_some_and(|start| start.iter().all(u8::is_ascii_hexdigit))
    };
    arguments.iter().skip(1).any(begins)
}

/// Release builds abort on a panic, debug builds would go on without the task: both end here, with one code.
fn end_on_panic(code: u8) {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        print(panic);
        eprintln!("hint: this is a bug in seawall {}; please report it", env!("CARGO_PKG_VERSION"));
        process::exit(i32::from(code));
    }));
}

fn run(cli: &Cli, contract: Contract) -> u8 {
    let global = &cli.global;
    telemetry::set_up(global.log_format.into(), global.verbosity(cli.command.base_verbosity()));
    let ended = match &cli.command {
        Command::Run(args) => run::run(global, args),
        Command::Demo(args) => demo::run(args),
        Command::Init(args) => init::run(global, args),
        Command::Check(args) => check::run(global, args),
        Command::Status(args) => status::run(global, args),
        Command::Backup(args) => backup::run(global, args),
        Command::List(args) => list::run(global, args),
        Command::Pin(args) => pin::run(global, args, pin::Word::Pin),
        Command::Unpin(args) => pin::run(global, args, pin::Word::Unpin),
        Command::Expire(args) => expire::run(global, args),
        Command::Gaps(args) => gaps::run(global, args),
        Command::Window(args) => window::run(global, args),
        Command::Restore(args) => restore::run(global, args),
        Command::Find(args) => find::run(global, args),
        Command::Verify(args) => verify::run(global, args),
        Command::WalGet(args) => wal_get::run(global, args),
    };
    match ended {
        Ok(verdict) => verdict.code(),
        Err(failure) => {
            // `wal-get` has its own code for every error, and says that one.
            let code = match contract {
                Contract::RestoreCommand => ERROR_EXIT_CODE,
                _ => failure.exit_code as u8,
            };
            output::failure(&failure, code, global.log_format.into(), global.json);
            code
        }
    }
}

/// Prints what clap has to say: the help somebody asked for, or what is wrong with the arguments.
fn explain_usage(error: &clap::Error, arguments: &[OsString]) -> u8 {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        output::text(&error.render().to_string());
        return ExitCode::Success as u8;
    }
    let wants_json = arguments.iter().any(|argument| argument == "--json");
    let code = ExitCode::Usage as u8;
    if wants_json {
        let message = error.render().to_string();
        let first = message.lines().next().unwrap_or("usage").trim_start_matches("error: ").to_string();
        output::failure_json(&Failure::new(ExitCode::Usage, first).hint("see `seawall --help`"), code);
    }
    // Standard error, with colours on a terminal; a closed one is no reason to fail otherwise.
    let _ = error.print();
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_code_of_wal_get_is_between_2_and_125() {
        for code in 0..=255 {
            for answers in [true, false] {
                let given = harmless(code, answers, true);
                assert!(!(2..=125).contains(&given), "{code} became {given}");
            }
            assert_ne!(harmless(code, false, true), 1, "only wal-get itself proves an absence");
        }
        assert_eq!((harmless(0, true, true), harmless(1, true, true), harmless(64, true, true)), (0, 1, 255));
        assert_eq!((harmless(0, false, false), harmless(0, false, true)), (0, 255));
    }

    #[test]
    fn names_of_wal_are_recognised() {
        let asks = |line: &str| asks_for_wal(&line.split(' ').map(OsString::from).collect::<Vec<_>>());
        assert!(asks("seawall wal-get --help 00000002.history pg_wal/RECOVERYHISTORY"));
        assert!(asks("seawall wal-get -V 000000010000000000000001 x"));
        assert!(!asks("seawall --repository file:///a wal-get --help"));
    }
}
