//! Owns: showing how far something is: a bar on a terminal, else a line now and then, nothing with `-q`.
//! Does not own: what there is to be done (the verbs), the answer at the end (`output.rs`).

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::watch;

use super::args::Global;
use super::output;

/// Between two lines where there is no terminal.
const SAY_INTERVAL: Duration = Duration::from_secs(10);

/// Bytes of one phase.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    pub phase: &'static str,
    pub done: u64,
    pub total: u64,
}

#[derive(Debug)]
pub struct Shown {
    bar: Option<ProgressBar>,
    is_silent: bool,
}

impl Shown {
    pub fn new(global: &Global) -> Shown {
        let is_silent = global.quiet > 0;
        let bar = (std::io::stderr().is_terminal() && !is_silent).then(|| {
            let bar = ProgressBar::new(0);
            let template = "{msg:<18} [{wide_bar}] {bytes}/{total_bytes} {bytes_per_sec} {eta}";
            let style = ProgressStyle::with_template(template).expect("the template is one");
            bar.set_style(style.progress_chars("=> "));
            bar
        });
        Shown { bar, is_silent }
    }

    /// Never ends. `line` is what is said where no bar is; it gets how long the phase has lasted.
    pub async fn follow<P: Clone>(
        &self,
        mut progress: watch::Receiver<P>,
        step: impl Fn(&P) -> Step,
        line: impl Fn(&P, Duration) -> String,
    ) {
        // That it has begun need not be said.
        let mut phase = Some(step(&progress.borrow()).phase);
        let (mut began, mut said) = (Instant::now(), Instant::now());
        loop {
            let now = progress.borrow_and_update().clone();
            let step = step(&now);
            let is_new = phase.replace(step.phase) != Some(step.phase);
            if is_new {
                began = Instant::now();
            }
            match &self.bar {
                Some(bar) => {
                    if is_new {
                        bar.reset();
                    }
                    bar.set_message(step.phase);
                    bar.set_length(step.total);
                    bar.set_position(step.done);
                }
                None if !self.is_silent && (is_new || said.elapsed() >= SAY_INTERVAL) => {
                    said = Instant::now();
                    output::note(line(&now, began.elapsed()));
                }
                None => {}
            }
            if progress.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

/// It goes from the terminal when what it shows is over, however that ended.
impl Drop for Shown {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
