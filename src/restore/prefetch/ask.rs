//! Owns: the words between `wal-get` and the helper, and `wal-get`'s side of the conversation.
//! Does not own: the helper's side (`helper.rs`), what is done without an answer (`cli/wal_get.rs`).
//!
//! ```text
//! wal-get:  get <name>\n
//! helper:   .            while it works, each second
//!           ready\n      the segment is held ready now
//!           file <name>\n  the answer is in this file, which is nobody else's
//!           absent\n     shown by the store, as `wal-get` itself would have
//!           direct\n     find out yourself
//! ```
//!
//! Whatever else comes, or nothing, means: find out yourself. The helper never touches a destination: an answer that
//! comes too late must not replace what PostgreSQL has there by then.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::handover;
use super::place::Place;
use crate::repository::durable;
use crate::wal::SegmentName;

/// A helper that works says so in between.
const SILENCE_MAX: Duration = Duration::from_secs(5);
/// For one answer, however lively the helper is.
const ANSWER_DEADLINE: Duration = Duration::from_secs(60);
const ANSWER_BYTES_MAX: usize = 200;
pub const REQUEST_BYTES_MAX: usize = 100;
pub const ALIVE: u8 = b'.';

/// How `wal-get` ended without looking into the archive itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Delivered,
    Absent,
    /// It has to look itself.
    Direct,
    /// The same, and nobody is there who could be asked next time.
    NoHelper,
}

/// What the helper says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    Ready,
    File(String),
    Absent,
    Direct,
}

impl Reply {
    pub fn line(&self) -> String {
        match self {
            Reply::Ready => "ready\n".to_string(),
            Reply::File(name) => format!("file {name}\n"),
            Reply::Absent => "absent\n".to_string(),
            Reply::Direct => "direct\n".to_string(),
        }
    }

    fn parse(line: &str) -> Reply {
        match (line, line.strip_prefix("file ")) {
            (_, Some(name)) => Reply::File(name.to_string()),
            ("ready", _) => Reply::Ready,
            ("absent", _) => Reply::Absent,
            _ => Reply::Direct,
        }
    }
}

/// What the helper is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Question {
    Get(String),
    /// The restore is over.
    End,
}

impl Question {
    pub fn line(&self) -> String {
        match self {
            Question::Get(name) => format!("get {name}\n"),
            Question::End => "end\n".to_string(),
        }
    }

    pub fn parse(line: &str) -> Option<Question> {
        match line {
            "end" => Some(Question::End),
            _ => line.strip_prefix("get ").map(|name| Question::Get(name.to_string())),
        }
    }
}

/// Asks the helper for what is not held ready.
pub fn ask(place: &Place, name: &str, dest: &Path) -> Answer {
    let Ok(stream) = connect(&place.socket()) else { return Answer::NoHelper };
    let reply = match converse(stream, &Question::Get(name.to_string()), ANSWER_DEADLINE) {
        Ok(line) => Reply::parse(&line),
        Err(_) => return Answer::NoHelper,
    };
    match reply {
        Reply::Absent => Answer::Absent,
        Reply::Direct => Answer::Direct,
        Reply::Ready => match name.parse::<SegmentName>() {
            Ok(name) if handover::hand_over(place, name, dest).unwrap_or(false) => Answer::Delivered,
            _ => Answer::Direct,
        },
        Reply::File(file) => {
            let answer: Option<PathBuf> = place.answer(&file);
            match answer.map(|answer| durable::move_into_place(&answer, dest)) {
                Some(Ok(())) => Answer::Delivered,
                _ => Answer::Direct,
            }
        }
    }
}

/// Whether there is a helper.
pub fn is_there(place: &Place) -> bool {
    connect(&place.socket()).is_ok()
}

/// Tells the helper that the restore is over, and waits until it has gone.
pub fn end(place: &Place) {
    if let Ok(stream) = connect(&place.socket()) {
        let _ = converse(stream, &Question::End, SILENCE_MAX);
    }
}

/// A helper that hangs must not make this hang: neither connecting nor writing waits.
fn connect(socket: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let stream = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&stream, &SocketAddrUnix::new(socket)?)?;
    let stream = UnixStream::from(stream);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Says one line and hears one. An error when there is none within the time a living helper takes.
fn converse(mut stream: UnixStream, question: &Question, deadline: Duration) -> io::Result<String> {
    let started = Instant::now();
    stream.set_write_timeout(Some(SILENCE_MAX))?;
    stream.set_read_timeout(Some(SILENCE_MAX))?;
    stream.write_all(question.line().as_bytes())?;
    let mut line = Vec::new();
    let mut part = [0; 64];
    while started.elapsed() < deadline {
        let count = stream.read(&mut part)?;
        if count == 0 {
            break;
        }
        line.extend(part[..count].iter().filter(|&&byte| byte != ALIVE));
        if let Some(text) = line.strip_suffix(b"\n") {
            return String::from_utf8(text.to_vec()).map_err(|_| io::ErrorKind::InvalidData.into());
        }
        if line.len() > ANSWER_BYTES_MAX {
            break;
        }
    }
    Err(io::ErrorKind::UnexpectedEof.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::net::UnixListener;
    use std::thread;

    const NAME: &str = "00000002.history";

    /// A helper that says these bytes to whoever asks. Real ones die at any point: this one says so exactly.
    fn helper(place: &Place, words: String) -> thread::JoinHandle<()> {
        let listener = UnixListener::bind(place.socket()).unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; REQUEST_BYTES_MAX];
            let count = stream.read(&mut request).unwrap();
            assert_eq!(&request[..count], format!("get {NAME}\n").as_bytes());
            stream.write_all(words.as_bytes()).unwrap();
        })
    }

    #[test]
    fn only_a_whole_answer_counts() {
        let directory = tempfile::tempdir().unwrap();
        let place = Place::at(directory.path());
        let dest = directory.path().join("RECOVERYHISTORY");
        assert_eq!(ask(&place, NAME, &dest), Answer::NoHelper);
        for (words, expected) in [
            ("..absent\n", Answer::Absent),
            ("absent", Answer::NoHelper),
            ("", Answer::NoHelper),
            ("...", Answer::NoHelper),
            ("direct\n", Answer::Direct),
            ("Absent\n", Answer::Direct),
            ("ready\n", Answer::Direct),
            ("file answer-0000000000000001\n", Answer::Direct),
            ("file ../../etc/passwd\n", Answer::Direct),
        ] {
            let helper = helper(&place, words.to_string());
            assert_eq!(ask(&place, NAME, &dest), expected, "{words:?}");
            helper.join().unwrap();
            fs::remove_file(place.socket()).unwrap();
        }
        let name = place.new_answer();
        fs::write(place.path().join(&name), "1\t0/3000000\tx\n").unwrap();
        let helper = helper(&place, format!(".file {name}\n"));
        assert_eq!(ask(&place, NAME, &dest), Answer::Delivered);
        helper.join().unwrap();
        assert_eq!(fs::read_to_string(&dest).unwrap(), "1\t0/3000000\tx\n");
    }

    #[test]
    fn nobody_behind_the_socket_is_no_helper() {
        let directory = tempfile::tempdir().unwrap();
        let place = Place::at(directory.path());
        drop(UnixListener::bind(place.socket()).unwrap());
        assert_eq!(ask(&place, NAME, Path::new("x")), Answer::NoHelper);
    }
}
