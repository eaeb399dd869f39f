//! A line on stderr that says what is being done and how long the rest will take.

use std::io::{IsTerminal, Write, stderr};
use std::time::{Duration, Instant};

/// How far a run with a known number of steps has come.
pub struct Progress {
    steps: usize,
    done: usize,
    start: Instant,
    redraws: bool,
}

impl Progress {
    /// Nothing done yet.
    pub fn new(steps: usize) -> Self {
        Self { steps, done: 0, start: Instant::now(), redraws: stderr().is_terminal() }
    }

    /// Says what the next step is. On a terminal the line takes the place of the last one; in a log
    /// file there is one for every tenth of the way.
    pub fn step(&mut self, what: &str) {
        let number = self.done + 1;
        let line = format!("[{number}/{}] {what}{}", self.steps, self.left());
        // Nobody to tell when stderr is closed.
        if self.redraws {
            let _ = write!(stderr(), "\r\x1b[K{line}");
        } else if self.done.is_multiple_of(self.steps.div_ceil(10)) {
            let _ = writeln!(stderr(), "{line}");
        }
        self.done = number;
    }

    /// Leaves a clean line behind.
    pub fn end(&self) {
        if self.redraws {
            let _ = write!(stderr(), "\r\x1b[K");
        }
    }

    fn left(&self) -> String {
        if self.done == 0 {
            return String::new();
        }
        let left = time_left(self.start.elapsed(), self.done, self.steps);
        format!(", {} s left", left.as_secs() + 1)
    }
}

fn time_left(elapsed: Duration, done: usize, steps: usize) -> Duration {
    elapsed.mul_f64((steps - done) as f64 / done as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rest_is_expected_to_go_as_what_is_done() {
        assert_eq!(time_left(Duration::from_secs(10), 2, 6), Duration::from_secs(20));
    }
}
