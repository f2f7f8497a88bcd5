//! What a command shows while it waits: bars on a terminal, else one line for each change.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// How often a spinner moves.
const TICK: Duration = Duration::from_millis(120);

/// The waiting part of one command. Everything goes to standard error.
pub struct Progress {
    bars: Option<MultiProgress>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    said: String,
    spinner: Option<ProgressBar>,
    lines: BTreeMap<String, (ProgressBar, String)>,
}

impl Progress {
    /// Nothing is shown yet.
    pub fn new() -> Progress {
        let terminal = std::io::stderr().is_terminal();
        Progress { bars: terminal.then(MultiProgress::new), state: Mutex::default() }
    }

    /// Shows a sentence in place of the one before.
    pub fn say(&self, sentence: &str) {
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        if state.said == sentence {
            return;
        }
        state.said = sentence.to_owned();
        match &self.bars {
            None => eprintln!("{sentence}"),
            Some(bars) => {
                let spinner = state.spinner.get_or_insert_with(|| {
                    let spinner = bars.add(ProgressBar::new_spinner());
                    spinner.enable_steady_tick(TICK);
                    spinner
                });
                spinner.set_message(sentence.to_owned());
            }
        }
    }

    /// Shows how far one of several things is.
    pub fn bar(&self, name: &str, percent: u64, note: &str) {
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        let text = format!("{name} {percent} % {note}");
        let Some(bars) = &self.bars else {
            // Without a terminal one line a tenth is enough.
            let coarse = format!("{name} {} % {note}", percent / 10 * 10);
            let entry = state.lines.entry(name.to_owned()).or_insert_with(|| (ProgressBar::hidden(), String::new()));
            if entry.1 != coarse {
                entry.1 = coarse;
                eprintln!("{}", text.trim_end());
            }
            return;
        };
        let (bar, _) = state.lines.entry(name.to_owned()).or_insert_with(|| {
            let bar = bars.add(ProgressBar::new(100));
            if let Ok(style) = ProgressStyle::with_template("{prefix:28} [{bar:30}] {pos:>3} % {msg}") {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.set_prefix(name.to_owned());
            (bar, String::new())
        });
        bar.set_position(percent);
        bar.set_message(note.to_owned());
    }

    /// Whether this one was shown before.
    pub fn has_bar(&self, name: &str) -> bool {
        self.state.lock().unwrap_or_else(|e| e.into_inner()).lines.contains_key(name)
    }

    /// Takes everything off the terminal.
    pub fn finish(&self) {
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(spinner) = state.spinner.take() {
            spinner.finish_and_clear();
        }
        for (bar, _) in state.lines.values() {
            bar.finish_and_clear();
        }
        state.lines.clear();
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}
