//! Owns: a clock that servers and programs under test share and a test moves by hand (libfaketime, preloaded).
//! Does not own: the processes. Waiting is not shortened: only what the time of day is said to be.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use super::process::Scratch;

const LIBRARY: &str = "libfaketimeMT.so.1";

#[derive(Debug)]
pub struct ModelClock {
    library: PathBuf,
    scratch: Scratch,
}

impl ModelClock {
    /// Shows the real time. `None` where the library is not installed, and says so.
    pub fn new() -> Option<ModelClock> {
        let multiarch = fs::read_dir("/usr/lib").into_iter().flatten().flatten();
        let library = multiarch.map(|entry| entry.path().join("faketime").join(LIBRARY)).find(|path| path.exists());
        let Some(library) = library else {
            println!("skipped: libfaketime is not installed");
            return None;
        };
        let clock = ModelClock { library, scratch: Scratch::new() };
        clock.advance_to_day(0);
        Some(clock)
    }

    /// So many days from now, for everybody at once.
    pub fn advance_to_day(&self, day: u32) {
        let next = self.scratch.join("next");
        fs::write(&next, format!("+{day}d\n")).expect("the clock can be set");
        fs::rename(next, self.file()).expect("the clock can be set");
    }

    fn file(&self) -> PathBuf {
        self.scratch.join("clock")
    }

    /// Has a process to be started look at this clock.
    pub fn show_to<'c>(&self, command: &'c mut Command) -> &'c mut Command {
        command.env("LD_PRELOAD", &self.library).env("FAKETIME_TIMESTAMP_FILE", self.file());
        command.env("FAKETIME_NO_CACHE", "1").env("FAKETIME_DONT_FAKE_MONOTONIC", "1").env("NO_FAKE_STAT", "1")
    }
}
