//! Tests of the schedule: times by hand, and a model clock that runs through years in which agents restart, backups take
//! their time and fail, and clocks jump.

use proptest::prelude::*;

use super::*;

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(86_400);

fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

fn zone(name: &str) -> TimeZone {
    TimeZone::get(name).unwrap()
}

fn line(text: &str) -> Line {
    Line::parse(text).unwrap()
}

fn timing() -> Timing {
    Timing { zone: TimeZone::UTC, jitter: Duration::ZERO, seed: 7 }
}

fn ran(started: &str, finished: &str) -> Ran {
    Ran { started: at(started), finished: at(finished), start_lsn: None, seen: None }
}

fn moment(now: &str) -> Moment {
    Moment { now: at(now), since: at(now), up: Duration::ZERO, lsn: None }
}

fn firings(text: &str, zone_name: &str, from: &str, count: usize) -> Vec<String> {
    let Line::Cron(cron) = line(text) else { panic!("{text}") };
    let mut time = at(from);
    let mut found = Vec::new();
    for _ in 0..count {
        time = cron.next_after(time, &zone(zone_name)).unwrap();
        found.push(time.to_string());
    }
    found
}

#[test]
fn lines_are_read_and_shown() {
    for (text, shown) in [
        ("0 2 * * 0", "0 2 * * 0"),
        ("  */5\t0-6,20 1 JAN,JUN mon ", "*/5 0-6,20 1 JAN,JUN mon"),
        ("every 6h", "every 6h"),
        ("every  90min", "every 90min"),
        ("after 50GiB", "after 50GiB"),
        ("after 1MiB", "after 1MiB"),
        ("0 0 29 2 *", "0 0 29 2 *"),
        ("0 0 L * *", "0 0 L * *"),
    ] {
        let parsed = line(text);
        assert_eq!(parsed.to_string(), shown);
        assert_eq!(line(shown), parsed);
    }
    for text in [
        "",
        "every",
        "every 6",
        "every 59s",
        "every 367d",
        "every -1h",
        "after",
        "after 50",
        "after 0B",
        "after 1023KiB",
        "0 2 * *",
        "0 0 2 * * 0",
        "0 2 * * 0 2027",
        "60 * * * *",
        "* 24 * * *",
        "* * 0 * *",
        "* * 32 * *",
        "* * * 13 *",
        "* * * * 8",
        "@daily",
        "x y z a b",
        "0 2 * * 0; rm",
        "Every 6h",
        "daily",
        "*/0 * * * *",
        "5-1 * * * *",
    ] {
        assert!(Line::parse(text).is_err(), "{text}");
    }
    for never in ["0 0 30 2 *", "0 0 31 4,6,9,11 *", "0 0 31 2 *"] {
        assert_eq!(Line::parse(never), Err(LineError::Never), "{never}");
    }
}

#[test]
fn the_longest_interval_is_known() {
    for (text, longest) in [
        ("0 2 * * 0", 7 * DAY),
        ("0 2 * * 1-6", 2 * DAY),
        ("0 2 * * *", DAY),
        ("0 */6 * * *", 6 * HOUR),
        ("0 8-18 * * *", 14 * HOUR),
        ("0 8-18 * * 1-5", 2 * DAY + 14 * HOUR),
        ("0 0 1 * *", 31 * DAY),
        ("0 0 1 1 *", 366 * DAY),
        ("0 0 29 2 *", (4 * 365 + 1) * DAY),
        ("every 6h", 6 * HOUR),
    ] {
        assert_eq!(line(text).longest_interval(), Some(longest), "{text}");
    }
    assert_eq!(line("after 1GiB").longest_interval(), None);
}

#[test]
fn a_named_hour_comes_once_when_the_clock_is_put_forward_or_back() {
    let berlin = |text, from| firings(text, "Europe/Berlin", from, 3);
    // 2027-03-28: 02:00 CET is 03:00 CEST.
    let spring = ["2027-03-27T01:30:00Z", "2027-03-28T01:00:00Z", "2027-03-29T00:30:00Z"];
    assert_eq!(berlin("30 2 * * *", "2027-03-26T12:00:00Z"), spring, "left out: at the end of the gap");
    assert_eq!(berlin("30 2,14 28 3 *", "2027-03-28T00:59:59Z")[..2], ["2027-03-28T01:00:00Z", "2027-03-28T12:30:00Z"]);
    assert_eq!(
        berlin("0,30 2,3 28 3 *", "2027-03-28T00:00:00Z")[..2],
        ["2027-03-28T01:00:00Z", "2027-03-28T01:30:00Z"]
    );
    // 2027-10-31: 03:00 CEST is 02:00 CET.
    let autumn = ["2027-10-30T00:30:00Z", "2027-10-31T00:30:00Z", "2027-11-01T01:30:00Z"];
    assert_eq!(berlin("30 2 * * *", "2027-10-29T12:00:00Z"), autumn, "the first of the two");
    assert_eq!(berlin("30 2 * * *", "2027-10-31T01:00:00Z")[0], "2027-11-01T01:30:00Z", "asked between the two");
    assert_eq!(berlin("30 2 * * *", "2027-10-31T01:30:00Z")[0], "2027-11-01T01:30:00Z", "asked at the second");
    // Hours that are counted go on being counted.
    let hourly = ["2027-10-31T00:00:00Z", "2027-10-31T01:00:00Z", "2027-10-31T02:00:00Z"];
    assert_eq!(berlin("0 * * * *", "2027-10-30T23:30:00Z"), hourly);
    let hourly = ["2027-03-28T00:00:00Z", "2027-03-28T01:00:00Z", "2027-03-28T02:00:00Z"];
    assert_eq!(berlin("0 * * * *", "2027-03-27T23:30:00Z"), hourly);
    // Half an hour, and a whole day that never was.
    assert_eq!(firings("15 2 * * *", "Australia/Lord_Howe", "2027-10-02T12:00:00Z", 1), ["2027-10-02T15:30:00Z"]);
    assert_eq!(firings("0 12 30 12 *", "Pacific/Apia", "2011-12-29T12:00:00Z", 1), ["2011-12-30T10:00:00Z"]);
}

#[test]
fn cron_catches_up_once_on_what_was_missed() {
    let weekly = line("0 2 * * 0");
    let look = |runs: &[Ran], now: &str| next(&weekly, &timing(), runs, &moment(now));
    let last = [ran("2026-11-01T02:00:00Z", "2026-11-01T03:00:00Z")];
    let waiting = look(&last, "2026-11-08T01:59:59Z");
    assert_eq!((waiting.at, waiting.is_due), (Some(at("2026-11-08T02:00:00Z")), false));
    assert_eq!(
        (waiting.wait(at("2026-11-08T01:59:59Z")), &waiting.because[..]),
        (Some(Duration::from_secs(1)), "0 2 * * 0")
    );
    assert!(look(&last, "2026-11-08T02:00:00Z").is_due);
    let missed = look(&last, "2026-11-29T10:00:00Z");
    assert!(missed.is_due && missed.because == "0 2 * * 0, missed at 2026-11-08T02:00:00Z", "{missed:?}");
    // Three were missed: one is caught up on.
    let caught_up = [last[0], ran("2026-11-29T10:00:00Z", "2026-11-29T11:00:00Z")];
    assert_eq!(look(&caught_up, "2026-11-29T11:00:01Z").at, Some(at("2026-12-06T02:00:00Z")));
    // Its time passed while one was running.
    let long = [ran("2026-11-28T10:00:00Z", "2026-11-29T10:00:00Z")];
    assert_eq!(look(&long, "2026-11-29T11:00:01Z").at, Some(at("2026-12-06T02:00:00Z")));
    // Where there was none, from when on it counts.
    let none = Moment { since: at("2026-11-21T00:00:00Z"), ..moment("2026-11-22T03:00:00Z") };
    assert!(next(&weekly, &timing(), &[], &none).is_due);
}

#[test]
fn an_interval_is_measured_from_begin_to_begin() {
    let every = line("every 6h");
    let look = |runs: &[Ran], now: &str| next(&every, &timing(), runs, &moment(now));
    let last = [ran("2026-11-22T00:10:00Z", "2026-11-22T01:00:00Z")];
    assert_eq!(look(&last, "2026-11-22T02:00:00Z").at, Some(at("2026-11-22T06:10:00Z")));
    assert!(look(&last, "2026-11-30T00:00:00Z").is_due);
    let long = [ran("2026-11-22T00:10:00Z", "2026-11-22T13:00:00Z")];
    assert_eq!(look(&long, "2026-11-22T13:00:00Z").at, Some(at("2026-11-22T18:10:00Z")), "not one behind the other");
}

#[test]
fn an_amount_of_wal_is_counted_on_the_line() {
    let after = line("after 1MiB");
    let run = |start: u64| Ran { start_lsn: Some(Lsn(start)), ..ran("2026-11-22T00:00:00Z", "2026-11-22T01:00:00Z") };
    let look = |runs: &[Ran], lsn| next(&after, &timing(), runs, &Moment { lsn, ..moment("2026-11-22T02:00:00Z") });
    let runs = [run(5 << 20), run(3 << 20)];
    assert!(!look(&runs, Some(Lsn((6 << 20) - 1))).is_due);
    assert!(look(&runs, Some(Lsn(6 << 20))).is_due);
    assert!(!look(&runs, None).is_due);
    // One that began further on than WAL is now began on a line that was left.
    assert!(!look(&runs, Some(Lsn((4 << 20) - 1))).is_due);
    assert!(look(&runs, Some(Lsn(4 << 20))).is_due);
    let counted = next(
        &line("after 50GiB"),
        &timing(),
        &[run(0)],
        &Moment { lsn: Some(Lsn(12 << 30)), ..moment("2026-11-22T02:00:00Z") },
    );
    assert_eq!((counted.at, &counted.because[..]), (None, "after 50GiB of WAL, 12GiB so far"));
}

#[test]
fn a_clock_that_jumps_back_brings_neither_silence_nor_a_storm() {
    let weekly = line("0 2 * * 0");
    // Taken while the clock was a year ahead.
    let ahead = ran("2027-11-22T00:00:00Z", "2027-11-22T01:00:00Z");
    let before = ran("2026-11-15T02:00:00Z", "2026-11-15T03:00:00Z");
    let now = Moment { up: 40 * DAY, ..moment("2026-11-20T00:00:00Z") };
    let sunday = Some(at("2026-11-22T02:00:00Z"));
    assert_eq!(next(&weekly, &timing(), &[before, ahead], &now).at, sunday, "one nobody saw end does not count");
    let seen = Ran { seen: Some(HOUR), ..ahead };
    assert_eq!(next(&weekly, &timing(), &[before, seen], &now).at, sunday);
    let seen_before = Ran { seen: Some(20 * DAY), ..ahead };
    assert!(!next(&weekly, &timing(), &[before, seen_before], &now).is_due);
    // A whole archive that lies in what is to come: within one interval of when it was seen.
    assert_eq!(next(&weekly, &timing(), &[seen], &now).at, sunday);
    assert!(next(&weekly, &timing(), &[Ran { seen: Some(8 * DAY), ..ahead }], &now).is_due);
    let every = next(&line("every 6h"), &timing(), &[seen], &now);
    assert_eq!(every.at, Some(at("2026-11-20T04:00:00Z")), "begun two hours ago");
    // Two clocks that are not quite the same.
    let close = ran("2026-11-20T00:00:00Z", "2026-11-20T00:00:05Z");
    assert_eq!(next(&line("every 6h"), &timing(), &[close], &now).at, Some(at("2026-11-20T06:00:00Z")));
}

#[test]
fn jitter_stays_the_same_and_spreads() {
    let weekly = line("0 2 * * 0");
    let last = [ran("2026-11-01T02:00:00Z", "2026-11-01T03:00:00Z")];
    let of = |seed| {
        let timing = Timing { jitter: HOUR, seed, ..timing() };
        let found = next(&weekly, &timing, &last, &moment("2026-11-02T00:00:00Z"));
        assert_eq!(found, next(&weekly, &timing, &last, &moment("2026-11-02T00:00:00Z")));
        found.at.unwrap().duration_since(at("2026-11-08T02:00:00Z")).as_secs()
    };
    let offsets: Vec<i64> = (0..64).map(of).collect();
    assert!(offsets.iter().all(|offset| (0..3600).contains(offset)), "{offsets:?}");
    let quarters: std::collections::BTreeSet<i64> = offsets.iter().map(|offset| offset / 900).collect();
    assert_eq!(quarters.len(), 4, "{offsets:?}");
}

#[test]
fn what_includes_the_others_goes_first() {
    let next = |is_due| Next { at: None, is_due, because: String::new() };
    let lines = [("full", next(false)), ("sample", next(true)), ("quick", next(true))];
    assert_eq!(first_due(&lines).map(|(name, _)| *name), Some("sample"));
    assert_eq!(first_due(&lines[..1]), None);
}

/// A model of an agent: it looks every so often, one run at a time, and knows after a restart only what the archive holds.
struct Agent {
    line: Line,
    timing: Timing,
    /// By the clock as it was, with the true time of their end.
    runs: Vec<(Ran, i64)>,
    /// The true time at which the process began.
    up_since: i64,
    since: Timestamp,
}

impl Agent {
    fn new(line: Line, timing: Timing, since: Timestamp) -> Agent {
        Agent { line, timing, runs: Vec::new(), up_since: 0, since }
    }

    fn look(&self, true_now: i64, now: Timestamp) -> Next {
        let seconds = |seconds: i64| Duration::from_secs(seconds.unsigned_abs());
        let seen = |ended: i64| (ended >= self.up_since).then(|| seconds(true_now - ended));
        let runs: Vec<Ran> = self.runs.iter().map(|(run, ended)| Ran { seen: seen(*ended), ..*run }).collect();
        let moment = Moment { now, since: self.since, up: seconds(true_now - self.up_since), lsn: None };
        next(&self.line, &self.timing, &runs, &moment)
    }
}

fn plus(time: Timestamp, seconds: i64) -> Timestamp {
    time.checked_add(SignedDuration::from_secs(seconds)).unwrap()
}

/// Ten years of a cron line: every firing gives one run, unless one was running.
fn decade(text: &str, zone_name: &str, step: i64, takes: i64) {
    let zone = zone(zone_name);
    let begin = at("2026-01-01T00:30:00Z");
    let end = at("2036-01-01T00:00:00Z");
    let mut agent = Agent::new(line(text), Timing { zone: zone.clone(), ..timing() }, begin);
    let mut now = begin;
    while now < end {
        let found = agent.look(now.as_second(), now);
        // The model looks when it is time, or at its own pace where that is sooner.
        let wait = found.wait(now).unwrap_or(DAY).as_secs().cast_signed();
        if found.is_due {
            let finished = plus(now, takes);
            agent.runs = vec![(Ran { started: now, finished, start_lsn: None, seen: None }, finished.as_second())];
            let Line::Cron(cron) = &agent.line else { panic!("a cron line") };
            // It began within a second of a firing, of the first one since the last run ended.
            let firing = cron.next_after(plus(now, -1), &zone).unwrap();
            assert_eq!(firing, now, "{text}");
            now = finished;
        } else {
            now = plus(now, wait.clamp(1, step));
        }
    }
    assert!(agent.runs.len() == 1);
}

#[test]
fn a_decade_of_firings() {
    decade("30 2 * * 0", "Europe/Berlin", 86_400 * 3, 3600);
    decade("0 2 * * *", "America/New_York", 40_000, 7200);
    decade("15 */8 * * *", "Australia/Lord_Howe", 86_400, 60);
    decade("0 0 1 * *", "Asia/Kathmandu", 86_400 * 9, 86_400);
}

/// Every firing, counted independently of [`next`].
#[test]
fn each_firing_of_years_gives_one_run_and_no_more() {
    let zone = zone("Europe/Berlin");
    let begin = at("2026-06-01T00:00:00Z");
    for text in ["30 2 * * *", "0 */6 * * *", "45 2,14 * * 1,4"] {
        let parsed = line(text);
        let Line::Cron(cron) = &parsed else { panic!("a cron line") };
        let mut expected = Vec::new();
        let mut time = begin;
        while expected.len() < 1500 {
            time = cron.next_after(time, &zone).unwrap();
            expected.push(time);
        }
        let mut agent = Agent::new(parsed.clone(), Timing { zone: zone.clone(), ..timing() }, begin);
        let (mut now, mut found) = (begin, Vec::new());
        while found.len() < expected.len() {
            let next = agent.look(now.as_second(), now);
            if next.is_due {
                found.push(now);
                let finished = plus(now, 30);
                agent.runs = vec![(Ran { started: now, finished, start_lsn: None, seen: None }, finished.as_second())];
                now = finished;
            } else {
                now = plus(now, next.wait(now).unwrap().as_secs().cast_signed().max(1));
            }
        }
        assert_eq!(found, expected, "{text}");
    }
}

proptest! {
    #[test]
    fn any_text_is_read_or_refused(text in ".{0,40}") {
        let _ = Line::parse(&text);
    }

    #[test]
    fn any_five_fields_are_read_or_refused(text in "[0-9*/,LW#?A-C -]{1,6} [0-9*/,-]{1,5} [0-9*/,LW-]{1,5} [0-9*/,-]{1,4} [0-9*/,L#+-]{1,4}") {
        if let Ok(Line::Cron(cron)) = Line::parse(&text) {
            let from = at("2026-11-22T11:00:00Z");
            if let Some(next) = cron.next_after(from, &zone("Europe/Berlin")) {
                prop_assert!(next > from);
            }
        }
    }

    /// Firings never come back, in any zone, and none lies between two that follow each other.
    #[test]
    fn firings_go_forward(
        seconds in 1_700_000_000i64..2_000_000_000,
        line_of in 0usize..6,
        zone_of in 0usize..5,
    ) {
        let text = ["30 2 * * *", "0 * * * *", "*/20 1-3 * * *", "0,59 0,1,2,3,23 * * *", "0 0 1 * *", "5 3 * * 0"][line_of];
        let zone = zone(["Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "America/Santiago", "Africa/Cairo"][zone_of]);
        let Line::Cron(cron) = line(text) else { panic!("a cron line") };
        let from = Timestamp::from_second(seconds).unwrap();
        let next = cron.next_after(from, &zone).unwrap();
        prop_assert!(next > from);
        // Asked from anywhere between, it is the same.
        let between = plus(from, next.duration_since(from).as_secs() / 2);
        prop_assert_eq!(cron.next_after(between, &zone).unwrap(), next);
        prop_assert_eq!(cron.next_after(plus(next, -1), &zone).unwrap(), next);
    }

    /// Whatever the clock does, and whenever the agent begins anew: no two runs closer than the line asks for but one for
    /// each jump or restart, and no silence longer than an interval, restarts and jumps apart.
    #[test]
    fn no_storm_and_no_silence(
        events in prop::collection::vec((0u8..10, 1i64..400_000, -40_000_000i64..40_000_000), 1..60),
        is_cron in any::<bool>(),
    ) {
        let interval = 86_400;
        let text = if is_cron { "0 2 * * *" } else { "every 1d" };
        let begin = at("2026-11-22T11:00:00Z");
        let mut agent = Agent::new(line(text), timing(), begin);
        // What the clock shows is `true_now + skew`.
        let (mut true_now, mut skew) = (0i64, 0i64);
        let (mut quiet_since, mut disturbances, mut runs) = (0i64, 0i64, 0i64);
        for (kind, length, jump) in events {
            match kind {
                0 => {
                    skew += jump;
                    (disturbances, quiet_since) = (disturbances + 1, true_now);
                }
                1 => {
                    agent.up_since = true_now;
                    (disturbances, quiet_since) = (disturbances + 1, true_now);
                }
                _ => {}
            }
            let stop = true_now + length;
            while true_now < stop {
                let now = plus(begin, true_now + skew);
                let found = agent.look(true_now, now);
                if found.is_due {
                    runs += 1;
                    let took = 600;
                    let run = Ran { started: now, finished: plus(now, took), start_lsn: None, seen: None };
                    true_now += took;
                    agent.runs.push((run, true_now));
                    quiet_since = true_now;
                    continue;
                }
                prop_assert!(true_now - quiet_since <= interval, "silence for {} s", true_now - quiet_since);
                // In steps, as the agent looks: the clock may jump meanwhile.
                true_now += found.wait(now).unwrap().as_secs().cast_signed().clamp(1, 7200).min(stop - true_now);
            }
            prop_assert!(runs <= true_now / interval + 1 + 2 * disturbances, "{runs} runs in {true_now} s");
        }
    }
}
