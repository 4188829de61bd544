//! Owns: an object's parts as a request body: sent as they lie in memory, again for each attempt.
//! Does not own: what is in them, how many attempts there are.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use aws_sdk_s3::primitives::{ByteStream, SdkBody};
use bytes::{Bytes, BytesMut};
use http_body::{Body, Frame, SizeHint};

/// A body of `parts`, none of which is copied.
pub(super) fn streamed(parts: &[Bytes]) -> ByteStream {
    match parts {
        [] => ByteStream::new(SdkBody::empty()),
        [whole] => ByteStream::new(SdkBody::from(whole.clone())),
        parts => {
            let parts: Arc<[Bytes]> = parts.into();
            let begin = move || SdkBody::from_body_1_x(Parts { parts: Arc::clone(&parts), next: 0 });
            ByteStream::new(SdkBody::retryable(begin))
        }
    }
}

/// A body in one piece: only such a one is hashed into the request's signature.
pub(super) fn gathered(parts: &[Bytes]) -> ByteStream {
    match parts {
        [whole] => ByteStream::from(whole.clone()),
        parts => {
            let mut whole = BytesMut::with_capacity(length(parts) as usize);
            parts.iter().for_each(|part| whole.extend_from_slice(part));
            ByteStream::from(whole.freeze())
        }
    }
}

pub(super) fn length(parts: &[Bytes]) -> u64 {
    parts.iter().map(|part| part.len() as u64).sum()
}

pub(super) fn crc32(parts: &[Bytes]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    parts.iter().for_each(|part| hasher.update(part));
    hasher.finalize()
}

#[derive(Debug)]
struct Parts {
    parts: Arc<[Bytes]>,
    next: usize,
}

impl Body for Parts {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        // An empty frame would look like the end to some.
        while self.parts.get(self.next).is_some_and(Bytes::is_empty) {
            self.next += 1;
        }
        let part = self.parts.get(self.next).cloned();
        self.next += 1;
        Poll::Ready(part.map(|part| Ok(Frame::data(part))))
    }

    fn is_end_stream(&self) -> bool {
        self.size_hint().exact() == Some(0)
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(length(self.parts.get(self.next..).unwrap_or_default()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn parts_arrive_in_order_and_twice() {
        let parts = ["", "ab", "", "", "c", "def", ""].map(|text| Bytes::from_static(text.as_bytes()));
        let body = streamed(&parts).into_inner();
        assert_eq!(body.content_length(), Some(6));
        for _ in 0..2 {
            let again = body.try_clone().expect("it can be sent again");
            assert_eq!(ByteStream::new(again).collect().await.unwrap().to_vec(), b"abcdef");
        }
        assert_eq!(gathered(&parts).collect().await.unwrap().to_vec(), b"abcdef");
        assert_eq!(streamed(&[]).collect().await.unwrap().to_vec(), b"");
        assert_eq!(crc32(&parts), crc32fast::hash(b"abcdef"));
    }
}
