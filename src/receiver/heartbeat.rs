//! Owns: when a status goes out, when a silent peer is probed, when it is given up, when a stop is recognised.
//! Does not own: clocks, sockets, the positions in a status. Pure: time comes in as an argument.
//! Rests on proto-notes/03-streaming.md, "keepalive" and "a stopping server".

use std::collections::VecDeque;
use std::time::Duration;

use crate::wal::Lsn;

/// Time since the stream began.
pub type Elapsed = Duration;

#[derive(Clone, Copy, Debug)]
pub struct HeartbeatOptions {
    /// A status goes out at least this often: at most a quarter of the server's `wal_sender_timeout`.
    pub status_interval: Duration,
    /// After this long without a byte an answer is asked for, after twice as long the peer is dead.
    pub silence: Duration,
}

/// What is due now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    Status { reply_requested: bool },
    PeerDead,
}

/// The timers of one stream.
#[derive(Debug)]
pub struct Heartbeat {
    options: HeartbeatOptions,
    status_due: Elapsed,
    heard_at: Elapsed,
    probed: bool,
}

impl Heartbeat {
    pub fn new(options: HeartbeatOptions, now: Elapsed) -> Heartbeat {
        Heartbeat { options, status_due: now, heard_at: now, probed: false }
    }

    /// Anything came from the server.
    pub fn handle_heard(&mut self, now: Elapsed) {
        self.heard_at = now;
        self.probed = false;
    }

    /// We are not reading on purpose, so silence says nothing.
    pub fn handle_not_reading(&mut self, now: Elapsed) {
        self.handle_heard(now);
    }

    /// A status went out.
    pub fn handle_status_sent(&mut self, now: Elapsed) {
        self.status_due = now + self.options.status_interval;
    }

    pub fn poll(&mut self, now: Elapsed) -> Option<Due> {
        let silent = now.saturating_sub(self.heard_at);
        if silent >= 2 * self.options.silence {
            return Some(Due::PeerDead);
        }
        if silent >= self.options.silence && !self.probed {
            self.probed = true;
            return Some(Due::Status { reply_requested: true });
        }
        (now >= self.status_due).then_some(Due::Status { reply_requested: self.probed })
    }

    pub fn next_timeout(&self) -> Elapsed {
        let silence = if self.probed { 2 * self.options.silence } else { self.options.silence };
        self.status_due.min(self.heard_at + silence)
    }
}

/// Recognises a server that is stopping and waits for our flush: three reply-requested keepalives within a
/// second, each answered, each at our received position, while our reported flush is behind it.
///
/// A running server asks only after half of `wal_sender_timeout` without a message of ours, and the status
/// interval is at most a quarter of that.
#[derive(Debug, Default)]
pub struct StopDetector {
    asked_at: VecDeque<Elapsed>,
}

impl StopDetector {
    const KEEPALIVES: usize = 3;
    const WITHIN: Duration = Duration::from_secs(1);

    /// A reply-requested keepalive that was answered. True when the server is stopping.
    pub fn handle_keepalive(&mut self, now: Elapsed, server_sent: Lsn, received: Lsn, reported_flush: Lsn) -> bool {
        if server_sent != received || reported_flush >= received {
            self.asked_at.clear();
            return false;
        }
        self.asked_at.push_back(now);
        while self.asked_at.len() > Self::KEEPALIVES {
            self.asked_at.pop_front();
        }
        self.asked_at.len() == Self::KEEPALIVES && now - self.asked_at[0] <= Self::WITHIN
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(s: u64) -> Duration {
        Duration::from_secs(s)
    }

    fn heartbeat() -> Heartbeat {
        let options = HeartbeatOptions { status_interval: seconds(5), silence: seconds(20) };
        Heartbeat::new(options, seconds(0))
    }

    #[test]
    fn a_status_goes_out_at_once_and_then_in_its_interval() {
        let mut heartbeat = heartbeat();
        assert_eq!(heartbeat.poll(seconds(0)), Some(Due::Status { reply_requested: false }));
        heartbeat.handle_status_sent(seconds(0));
        assert_eq!(heartbeat.poll(seconds(4)), None);
        assert_eq!(heartbeat.next_timeout(), seconds(5));
        assert_eq!(heartbeat.poll(seconds(5)), Some(Due::Status { reply_requested: false }));
    }

    #[test]
    fn a_silent_peer_is_asked_and_then_given_up() {
        let mut heartbeat = heartbeat();
        heartbeat.handle_status_sent(seconds(18));
        assert_eq!(heartbeat.poll(seconds(20)), Some(Due::Status { reply_requested: true }));
        heartbeat.handle_status_sent(seconds(20));
        assert_eq!(heartbeat.poll(seconds(21)), None);
        assert_eq!(heartbeat.poll(seconds(40)), Some(Due::PeerDead));
    }

    #[test]
    fn an_answer_keeps_the_peer_alive() {
        let mut heartbeat = heartbeat();
        heartbeat.poll(seconds(20));
        heartbeat.handle_heard(seconds(21));
        heartbeat.handle_status_sent(seconds(39));
        assert_eq!(heartbeat.poll(seconds(40)), None);
    }

    #[test]
    fn not_reading_is_not_silence() {
        let mut heartbeat = heartbeat();
        for now in 0..200 {
            heartbeat.handle_not_reading(seconds(now));
            heartbeat.handle_status_sent(seconds(now));
            assert_eq!(heartbeat.poll(seconds(now)), None);
        }
    }

    #[test]
    fn three_answered_requests_within_a_second_are_a_stop() {
        let mut detector = StopDetector::default();
        let ms = Duration::from_millis;
        assert!(!detector.handle_keepalive(ms(0), Lsn(80), Lsn(80), Lsn(40)));
        assert!(!detector.handle_keepalive(ms(300), Lsn(80), Lsn(80), Lsn(40)));
        assert!(detector.handle_keepalive(ms(600), Lsn(80), Lsn(80), Lsn(40)));
    }

    #[test]
    fn requests_far_apart_or_elsewhere_are_no_stop() {
        let mut detector = StopDetector::default();
        for now in 0..10 {
            assert!(!detector.handle_keepalive(seconds(now), Lsn(80), Lsn(80), Lsn(40)));
        }
        let mut detector = StopDetector::default();
        for _ in 0..10 {
            assert!(!detector.handle_keepalive(seconds(1), Lsn(90), Lsn(80), Lsn(40)), "more WAL is to come");
            assert!(!detector.handle_keepalive(seconds(1), Lsn(80), Lsn(80), Lsn(80)), "we are not behind");
        }
    }
}
