//! A year in a minute: a server, an agent and the verbs live by a clock that jumps from week to week; backups are taken,
//! retention is applied, and what is promised comes back.

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use crate::support::agent::{self, Agent};
use crate::support::archived::{Archived, create_journal, note, notes};
use crate::support::model_clock::ModelClock;
use crate::support::postgres::{self, Server};
use crate::support::process::{self, Scratch};

const DEADLINE: Duration = Duration::from_secs(300);
const WEEKS: u32 = 52;
/// What is configured below.
const WINDOW_WEEKS: u32 = 4;
const MONTHS: u32 = 6;

struct Year {
    clock: Arc<ModelClock>,
    server: Server,
    archive: Archived,
    scratch: Scratch,
    agent: Agent,
    /// The time by the server's clock at which it had this many notes.
    instants: Vec<(String, usize)>,
}

impl Year {
    fn begin(major: u32, clock: ModelClock) -> Year {
        let clock = Arc::new(clock);
        let server = Server::builder(major).wal_segment_mib(1).setting("wal_sender_timeout", "0").clock(&clock).start();
        create_journal(&server);
        let archive = Archived::of(&server);
        archive.configure(&format!(
            "retention.automatic = false\nretention.window = \"{}d\"\nretention.wal = \"{}d\"\n\
             retention.gfs.monthly = {MONTHS}\n",
            7 * WINDOW_WEEKS,
            7 * WINDOW_WEEKS
        ));
        let scratch = Scratch::new();
        let mut command = agent::command_as_service_user(&scratch, ["--config", &archive.config_argument(), "run"]);
        clock.show_to(&mut command);
        let mut agent = Agent::spawn(command);
        agent.wait_for_log("streaming", DEADLINE);
        Year { clock, server, archive, scratch, agent, instants: Vec::new() }
    }

    fn seawall(&self, arguments: &[&str]) -> Command {
        let config = self.archive.config_argument();
        let words = [arguments, &["--config", &config]].concat();
        let mut command = agent::command_as_service_user(&self.scratch, words);
        self.clock.show_to(&mut command);
        command
    }

    fn answer(&self, arguments: &[&str]) -> Value {
        let text = process::run_ok(&mut self.seawall(&[arguments, &["--json"]].concat()), DEADLINE);
        serde_json::from_str(&text).expect("it is JSON")
    }

    /// A week goes by: something is written before and after its backup, and what is not needed any more goes.
    fn week(&mut self, week: u32) {
        self.clock.advance_to_day(7 * week);
        self.write(&format!("week {week}, before"));
        process::run_ok(&mut self.seawall(&["backup", "--wait"]), DEADLINE);
        self.write(&format!("week {week}, after"));
        self.answer(&["expire", "--apply"]);
    }

    /// A note, an instant behind it, and enough WAL to fill segments.
    fn write(&mut self, text: &str) {
        note(&self.server, text);
        let count = notes(&self.server).len();
        let now = self.server.sql("select clock_timestamp()::text").concat().concat();
        self.instants.push((now, count));
        self.server.sql("select pg_logical_emit_message(true, 'much', repeat('x', 1500000))");
        self.server.switch_wal();
    }

    /// Restores, starts the copy, and looks whether it has what the source had.
    fn comes_back(&self, name: &str, arguments: &[&str], expected: usize) {
        let pgdata = self.scratch.join(name);
        let words = [&["restore", "--pgdata", pgdata.to_str().expect("our paths are text")], arguments].concat();
        process::run_ok(&mut self.seawall(&words), DEADLINE);
        let copy = Server::builder(self.server.major()).clock(&self.clock).on_copy_of(&pgdata);
        let copy = copy.start_recovered().unwrap_or_else(|log| panic!("{name} does not recover:\n{log}"));
        assert_eq!(notes(&copy), notes(&self.server)[..expected], "{name}, {arguments:?}");
    }
}

#[test]
fn a_year_of_backups_and_retention_leaves_what_it_promises() {
    let Some(major) = postgres::newest_major() else { return };
    let Some(clock) = ModelClock::new() else { return };
    let mut year = Year::begin(major, clock);
    for week in 1..=WEEKS {
        year.week(week);
        if week == WEEKS / 2 {
            year.window_comes_back(&format!("week-{week}"));
        }
    }
    year.window_comes_back("end");

    // The monthly ones are there and bring back what they hold; what lies between them is gone.
    let list = year.answer(&["list"]);
    let backups = list["backups"].as_array().expect("a list").clone();
    let (least, most) = ((WINDOW_WEEKS + MONTHS - 2) as usize, (WINDOW_WEEKS + MONTHS + 2) as usize);
    assert!((least..=most).contains(&backups.len()), "{} of {WEEKS} backups are left: {list:#}", backups.len());
    let oldest = &backups[0];
    let (id, stop) = (oldest["id"].as_str().expect("an id"), oldest["stop_lsn"].as_str().expect("an LSN"));
    let at = format!("lsn:{stop}");
    let pgdata = year.scratch.join("oldest");
    let words = ["restore", "--pgdata", pgdata.to_str().expect("our paths are text"), "--backup", id, "--to", &at];
    process::run_ok(&mut year.seawall(&words), DEADLINE);
    let copy = Server::builder(year.server.major()).clock(&year.clock).on_copy_of(&pgdata);
    let copy = copy.start_recovered().unwrap_or_else(|log| panic!("the oldest does not recover:\n{log}"));
    let known = notes(&copy);
    assert!(known.len() > 2 && notes(&year.server).starts_with(&known), "{known:?}");
    let (time, _) = &year.instants[2];
    let refused =
        process::run(&mut year.seawall(&["restore", "--plan", "--pgdata", "/nowhere", "--to", time]), DEADLINE);
    assert_eq!(refused.status.code(), Some(1), "{}", String::from_utf8_lossy(&refused.stderr));

    // What was let go on purpose is no gap; the archive holds a small part of the year's WAL.
    year.archive.assert_no_gaps();
    let sealed: usize = year.archive.catalog().directories().map(|directory| directory.sealed.len()).sum();
    let written = year.server.flush_lsn().0 >> 20;
    assert!((sealed as u64) < written / 3, "{sealed} of {written} segments are left");
    assert!(year.agent.terminate(DEADLINE).success());
}

impl Year {
    /// Some instants of the window, its first one among them.
    fn window_comes_back(&self, name: &str) {
        self.archive.wait_acknowledged(&self.server);
        let instants = &self.instants;
        let first = instants.len() - (2 * WINDOW_WEEKS) as usize;
        for (round, at) in [first, first + 3, instants.len() - 1].into_iter().enumerate() {
            let (time, count) = &instants[at];
            self.comes_back(&format!("{name}-{round}"), &["--to", time], *count);
        }
    }
}
