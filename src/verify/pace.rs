//! Owns: how fast objects may be read: a token bucket over stored bytes.
//! Does not own: reading them (`reader.rs`).

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::Instant;

/// What may be read at once after a pause. More would be a burst that others notice; less would cut one request in two.
const BURST: Duration = Duration::from_millis(500);

/// Bytes a second, for everything one run reads. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Pace(Option<Arc<Mutex<Bucket>>>);

impl Pace {
    /// `None`: as fast as it goes.
    pub fn new(bytes_per_second: Option<u64>) -> Pace {
        Pace(bytes_per_second.map(|rate| Arc::new(Mutex::new(Bucket::new(rate.max(1), Instant::now())))))
    }

    /// Waits until `bytes` may be read.
    pub async fn take(&self, bytes: u64) {
        let Some(bucket) = &self.0 else { return };
        let wait = bucket.lock().expect("no holder panics").take(bytes, Instant::now());
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }
}

/// Whoever takes more than there is waits for what is missing, and those behind it as well.
#[derive(Debug)]
struct Bucket {
    bytes_per_second: u64,
    /// Below zero: owed.
    level: f64,
    at: Instant,
}

impl Bucket {
    fn new(bytes_per_second: u64, now: Instant) -> Bucket {
        Bucket { bytes_per_second, level: 0.0, at: now }
    }

    fn take(&mut self, bytes: u64, now: Instant) -> Duration {
        let rate = self.bytes_per_second as f64;
        let earned = now.saturating_duration_since(self.at).as_secs_f64() * rate;
        self.at = now;
        self.level = (self.level + earned).min(rate * BURST.as_secs_f64()) - bytes as f64;
        if self.level >= 0.0 { Duration::ZERO } else { Duration::from_secs_f64(-self.level / rate) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_than_the_rate_passes_whatever_the_pieces() {
        let start = Instant::now();
        let mut bucket = Bucket::new(1000, start);
        let mut now = start;
        let mut taken = 0;
        for piece in [1, 4000, 17, 0, 900, 5000, 1] {
            now += bucket.take(piece, now);
            taken += piece;
            assert!(
                (now - start).as_secs_f64() * 1000.0 + 1.0 >= taken as f64,
                "{taken} bytes after {:?}",
                now - start
            );
        }
    }

    #[test]
    fn a_pause_earns_half_a_second_at_most() {
        let start = Instant::now();
        let mut bucket = Bucket::new(1000, start);
        let later = start + Duration::from_secs(3600);
        assert_eq!(bucket.take(500, later), Duration::ZERO);
        assert_eq!(bucket.take(500, later), Duration::from_millis(500));
    }
}
