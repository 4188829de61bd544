//! Owns: what an S3 server can be told to do wrong, and which requests that meets.
//! Does not own: doing it (`s3.rs`).

use std::time::Duration;

use bytes::Bytes;

use super::s3_http::Answer;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operation {
    PutObject,
    GetObject,
    HeadObject,
    DeleteObject,
    DeleteObjects,
    ListObjects,
    CreateMultipartUpload,
    UploadPart,
    CompleteMultipartUpload,
    AbortMultipartUpload,
    ListMultipartUploads,
    ListParts,
    HeadBucket,
    CreateBucket,
    Other,
}

impl Operation {
    pub const ALL: [Operation; 15] = [
        Operation::PutObject,
        Operation::GetObject,
        Operation::HeadObject,
        Operation::DeleteObject,
        Operation::DeleteObjects,
        Operation::ListObjects,
        Operation::CreateMultipartUpload,
        Operation::UploadPart,
        Operation::CompleteMultipartUpload,
        Operation::AbortMultipartUpload,
        Operation::ListMultipartUploads,
        Operation::ListParts,
        Operation::HeadBucket,
        Operation::CreateBucket,
        Operation::Other,
    ];

    pub fn of(method: &str, has_key: bool, query: &str) -> Operation {
        let parameters: Vec<&str> = query.split('&').map(|pair| pair.split('=').next().unwrap_or(pair)).collect();
        let has = |name: &str| parameters.contains(&name);
        match (method, has_key) {
            ("PUT", true) if has("partNumber") => Operation::UploadPart,
            ("PUT", true) => Operation::PutObject,
            ("GET", true) if has("uploadId") => Operation::ListParts,
            ("GET", true) => Operation::GetObject,
            ("HEAD", true) => Operation::HeadObject,
            ("DELETE", true) if has("uploadId") => Operation::AbortMultipartUpload,
            ("DELETE", true) => Operation::DeleteObject,
            ("POST", true) if has("uploads") => Operation::CreateMultipartUpload,
            ("POST", true) if has("uploadId") => Operation::CompleteMultipartUpload,
            ("POST", false) if has("delete") => Operation::DeleteObjects,
            ("GET", false) if has("uploads") => Operation::ListMultipartUploads,
            ("GET", false) if has("list-type") => Operation::ListObjects,
            ("HEAD", false) => Operation::HeadBucket,
            ("PUT", false) => Operation::CreateBucket,
            _ => Operation::Other,
        }
    }

    /// The permission it needs, as policies name it.
    pub fn action(self) -> &'static str {
        match self {
            Operation::PutObject | Operation::CreateMultipartUpload => "s3:PutObject",
            Operation::UploadPart | Operation::CompleteMultipartUpload => "s3:PutObject",
            Operation::GetObject | Operation::HeadObject => "s3:GetObject",
            Operation::DeleteObject | Operation::DeleteObjects => "s3:DeleteObject",
            Operation::ListObjects | Operation::HeadBucket => "s3:ListBucket",
            Operation::AbortMultipartUpload => "s3:AbortMultipartUpload",
            Operation::ListMultipartUploads => "s3:ListBucketMultipartUploads",
            Operation::ListParts => "s3:ListMultipartUploadParts",
            Operation::CreateBucket => "s3:CreateBucket",
            Operation::Other => "s3:*",
        }
    }
}

/// What happens to a request instead of, or after, an honest answer.
#[derive(Clone, Debug)]
pub enum Fault {
    /// This answer; the request has no effect.
    Answer(Answer),
    /// The request takes effect, and this is answered: success lost, or told wrongly.
    EffectThenAnswer(Answer),
    /// Bytes that need not be HTTP, then the end.
    Garbage(Vec<u8>),
    CloseBefore,
    /// The request takes effect, and nobody hears of it.
    CloseAfter,
    /// Never answered; no effect.
    Hang,
    /// The request takes effect, and is never answered.
    HangAfter,
    /// Reads so many bytes of the request's body, then nothing more.
    StallReading {
        after: usize,
    },
    /// The first bytes of an honest answer's body, then silence.
    StallBody {
        after: usize,
    },
    /// An honest answer, its body in pieces of so many bytes, a pause after each.
    Trickle {
        bytes: usize,
        pause: Duration,
    },
    /// The honest head, fewer bytes of the body than it promises, then the end.
    ShortBody {
        missing: usize,
    },
    /// An honest answer with a body that is shorter, and says so.
    TruncatedBody {
        missing: usize,
    },
    /// An honest answer with one bit of the body changed.
    WrongContent,
    /// An honest answer, later: the store is at a distance.
    Delay(Duration),
}

impl Fault {
    /// An error as S3 words it.
    pub fn error(status: u16, code: &str) -> Fault {
        Fault::Answer(s3_answer(status, code, ""))
    }

    /// An error with more elements in its XML (`<Region>…</Region>`) and headers.
    pub fn error_with(status: u16, code: &str, elements: &str, headers: &[(&str, &str)]) -> Fault {
        let mut answer = s3_answer(status, code, elements);
        answer.headers.extend(headers.iter().map(|(name, value)| (name.to_string(), value.to_string())));
        Fault::Answer(answer)
    }

    /// What a web server that is no S3 store says.
    pub fn html(status: u16) -> Fault {
        let body = "<!DOCTYPE html><html><head><title>Welcome</title></head><body>It works!</body></html>";
        let headers = vec![("content-type".to_owned(), "text/html".to_owned())];
        Fault::Answer(Answer { status, headers, body: Bytes::from_static(body.as_bytes()), is_to_head: false })
    }

    /// A status alone.
    pub fn status(status: u16) -> Fault {
        Fault::Answer(Answer { status, ..Answer::default() })
    }

    pub fn has_effect(&self) -> bool {
        match self {
            Fault::Answer(_) | Fault::Garbage(_) | Fault::CloseBefore | Fault::Hang => false,
            Fault::StallReading { .. } => false,
            Fault::EffectThenAnswer(_) | Fault::CloseAfter | Fault::HangAfter | Fault::StallBody { .. } => true,
            Fault::Trickle { .. } | Fault::ShortBody { .. } => true,
            Fault::TruncatedBody { .. } | Fault::WrongContent | Fault::Delay(_) => true,
        }
    }
}

/// An S3 error document in its envelope.
pub fn s3_answer(status: u16, code: &str, elements: &str) -> Answer {
    s3_answer_saying(status, code, &format!("told to answer {code}"), elements)
}

pub fn s3_answer_saying(status: u16, code: &str, message: &str, elements: &str) -> Answer {
    let body = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code><Message>{message}</Message>\
         {elements}<RequestId>TEST</RequestId></Error>"
    );
    let headers = vec![("content-type".to_owned(), "application/xml".to_owned())];
    Answer { status, headers, body: Bytes::from(body), is_to_head: false }
}

/// Which requests a fault meets.
#[derive(Clone, Debug)]
pub struct Rule {
    pub fault: Fault,
    operations: Vec<Operation>,
    key_part: Option<String>,
    skip: u64,
    times: u64,
    every: u64,
    met: u64,
}

impl Rule {
    /// Every request, for ever.
    pub fn new(fault: Fault) -> Rule {
        Rule { fault, operations: Vec::new(), key_part: None, skip: 0, times: u64::MAX, every: 1, met: 0 }
    }

    /// Only this operation; said several times, any of them.
    pub fn on(mut self, operation: Operation) -> Rule {
        self.operations.push(operation);
        self
    }

    /// Everything that writes.
    pub fn on_writes(self) -> Rule {
        let writes = [Operation::PutObject, Operation::CreateMultipartUpload, Operation::UploadPart];
        let rule = writes.into_iter().fold(self, Rule::on);
        rule.on(Operation::CompleteMultipartUpload).on(Operation::DeleteObject).on(Operation::DeleteObjects)
    }

    /// Only keys that hold this.
    pub fn key(mut self, part: &str) -> Rule {
        self.key_part = Some(part.to_owned());
        self
    }

    /// Not the first so many that it would meet.
    pub fn skip(mut self, requests: u64) -> Rule {
        self.skip = requests;
        self
    }

    /// At most so many.
    pub fn times(mut self, requests: u64) -> Rule {
        self.times = requests;
        self
    }

    /// Only each so-manieth that it would meet.
    pub fn every(mut self, requests: u64) -> Rule {
        self.every = requests;
        self
    }

    /// Counts what it fits.
    pub fn meets(&mut self, operation: Operation, key: &str) -> bool {
        let fits = (self.operations.is_empty() || self.operations.contains(&operation))
            && self.key_part.as_ref().is_none_or(|part| key.contains(part.as_str()));
        let is_skipped = fits && self.skip > 0;
        self.skip -= u64::from(is_skipped);
        self.met += u64::from(fits && !is_skipped);
        let meets = fits && !is_skipped && self.met.is_multiple_of(self.every) && self.times > 0;
        self.times -= u64::from(meets);
        meets
    }
}
