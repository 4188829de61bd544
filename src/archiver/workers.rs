//! Owns: where compression and encryption run: off the network task, on as many threads as the machine has cores.
//! Does not own: what they are given.

use std::sync::{Arc, Mutex};

use crate::codec::{Encoder, LEVEL_DEFAULT};

/// Encoders to borrow, and where their work runs. Clones share the encoders.
#[derive(Clone, Debug)]
pub struct Workers {
    idle: Arc<Mutex<Vec<Encoder>>>,
    place: Place,
}

#[derive(Clone, Copy, Debug)]
enum Place {
    /// On the runtime's threads for blocking work.
    Threads(usize),
    /// On the calling task: the simulation's order of events must not depend on threads.
    Inline,
}

impl Workers {
    pub fn threads(count: usize) -> Workers {
        Workers { idle: Arc::default(), place: Place::Threads(count.max(1)) }
    }

    pub fn inline() -> Workers {
        Workers { idle: Arc::default(), place: Place::Inline }
    }

    /// How many calls of [`Workers::run`] make progress at once.
    pub fn width(&self) -> usize {
        match self.place {
            Place::Threads(count) => count,
            Place::Inline => 1,
        }
    }

    /// Runs `work` on so few raw bytes that a change of threads would cost more than the work: a synchronous commit
    /// waits for it.
    pub async fn run_for<T: Send + 'static>(
        &self,
        raw_bytes: u64,
        work: impl FnOnce(&mut Encoder) -> T + Send + 'static,
    ) -> T {
        match raw_bytes <= Self::INLINE_BYTES_MAX {
            true => self.with_encoder(work),
            false => self.run(work).await,
        }
    }

    /// About 0.1 ms of compression.
    const INLINE_BYTES_MAX: u64 = 64 << 10;

    fn with_encoder<T>(&self, work: impl FnOnce(&mut Encoder) -> T) -> T {
        let borrowed = self.idle.lock().expect("no borrower panics holding the lock").pop();
        let mut encoder = borrowed.unwrap_or_else(|| Encoder::new(LEVEL_DEFAULT));
        let result = work(&mut encoder);
        self.idle.lock().expect("no borrower panics holding the lock").push(encoder);
        result
    }

    /// Runs `work` with an encoder.
    pub async fn run<T: Send + 'static>(&self, work: impl FnOnce(&mut Encoder) -> T + Send + 'static) -> T {
        let idle = self.idle.clone();
        self.run_alone(move || {
            let borrowed = idle.lock().expect("no borrower panics holding the lock").pop();
            let mut encoder = borrowed.unwrap_or_else(|| Encoder::new(LEVEL_DEFAULT));
            let result = work(&mut encoder);
            idle.lock().expect("no borrower panics holding the lock").push(encoder);
            result
        })
        .await
    }

    /// Runs `work` that needs no encoder: encryption.
    pub async fn run_alone<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        match self.place {
            Place::Inline => work(),
            Place::Threads(_) => match tokio::task::spawn_blocking(work).await {
                Ok(result) => result,
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            },
        }
    }
}
