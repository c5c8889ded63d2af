// A client in Go: a small job with Compute, a larger one with ComputeStream, and what a
// refusal says. docs/contract.md explains the order of the messages.
//
//	go run . localhost:50051
//	go run . -direct localhost:50051
//
// The second sends the larger job on direct connections, if the server has them.
// The stub is generated from protos/, see scripts/check-clients.
package main

import (
	"context"
	"encoding/binary"
	"flag"
	"fmt"
	"io"
	"log"
	"math"
	"time"

	pb "gradwire/v1"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
)

// A message of about 1 MiB is the fastest.
const chunkElements = 1 << 18

type matrix struct {
	rows, columns int
	elements      []float32
}

// bytes returns the elements of rows first to last-1, little-endian and row-major.
func (m matrix) bytes(first, last int) []byte {
	part := m.elements[first*m.columns : last*m.columns]
	data := make([]byte, 4*len(part))
	for i, element := range part {
		binary.LittleEndian.PutUint32(data[4*i:], math.Float32bits(element))
	}
	return data
}

// setBytes stores elements that begin at an index.
func (m matrix) setBytes(index int64, data []byte) {
	for i := 0; i < len(data)/4; i++ {
		bits := binary.LittleEndian.Uint32(data[4*i:])
		m.elements[index+int64(i)] = math.Float32frombits(bits)
	}
}

func newMatrix(rows, columns int) matrix {
	return matrix{rows, columns, make([]float32, rows*columns)}
}

// header describes a float32 job with all operands and results in its messages.
func header(m, n, k int64) *pb.Job {
	sent := &pb.Operand{Source: &pb.Operand_Inline{Inline: &pb.InlineSource{}}}
	returned := &pb.Result{Destination: &pb.Result_Inline{Inline: &pb.InlineDestination{}}}
	return &pb.Job{
		M: &m, N: n, K: k, Dtype: pb.Dtype_DTYPE_FLOAT32,
		X: sent, W: sent, Dy: sent, Y: returned, Dx: returned, Dw: returned,
	}
}

// compute sends a job with one message each way. Its operands, and its results, have at
// most 4 MiB - 64 KiB.
func compute(ctx context.Context, stub pb.GradientServiceClient, x, w, dy matrix) (y, dx, dw matrix, err error) {
	response, err := stub.Compute(ctx, &pb.ComputeRequest{
		Job: header(int64(x.rows), int64(x.columns), int64(w.columns)),
		X:   x.bytes(0, x.rows), W: w.bytes(0, w.rows), Dy: dy.bytes(0, dy.rows),
	})
	if err != nil {
		return
	}
	y, dx, dw = newMatrix(x.rows, w.columns), newMatrix(x.rows, x.columns), newMatrix(w.rows, w.columns)
	y.setBytes(0, response.Y)
	dx.setBytes(0, response.Dx)
	dw.setBytes(0, response.Dw)
	return
}

// computeStream sends a job of any size. One goroutine sends while another receives: a
// client that sends everything first is ended with CLIENT_IDLE. With connections above 0,
// and if the server takes them, the elements are on direct connections.
func computeStream(ctx context.Context, server string, stub pb.GradientServiceClient, x, w, dy matrix, blockRows int64, connections int32) (y, dx, dw matrix, receipt *pb.Receipt, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // Ends the sending goroutine, too, if receiving fails.
	stream, err := stub.ComputeStream(ctx)
	if err != nil {
		return
	}
	job := header(int64(x.rows), int64(x.columns), int64(w.columns))
	job.BlockRows = blockRows
	job.RequiredFeatures = []string{"block-rows"}
	if connections > 0 {
		job.Direct = &pb.DirectOffer{Connections: connections}
	}
	// io.EOF from Send means that the call has ended: Recv has its status.
	if err = stream.Send(&pb.ComputeStreamRequest{Message: &pb.ComputeStreamRequest_Job{Job: job}}); err != nil && err != io.EOF {
		return
	}
	y, dx, dw = newMatrix(x.rows, w.columns), newMatrix(x.rows, x.columns), newMatrix(w.rows, w.columns)
	results := map[pb.Matrix]matrix{pb.Matrix_MATRIX_Y: y, pb.Matrix_MATRIX_DX: dx, pb.Matrix_MATRIX_DW: dw}
	var moved chan error // What became of the elements on direct connections.
	for {
		var response *pb.ComputeStreamResponse
		response, err = stream.Recv()
		if err == io.EOF && receipt != nil {
			err = nil
			if moved != nil {
				err = <-moved // The last frames may come behind the receipt.
			}
			return
		}
		if err != nil {
			return
		}
		switch message := response.Message.(type) {
		case *pb.ComputeStreamResponse_Accepted:
			accepted := message.Accepted
			opened := openIfOffered(server, accepted.Direct, connections)
			if opened == nil {
				go sendOperands(stream, accepted.BlockRows, x, w, dy)
				continue
			}
			defer closeAll(opened)
			moved = make(chan error, 1)
			go func() {
				err := moveElements(opened, accepted.BlockRows, x, w, dy, results, accepted.Direct.MaxFrameBytes,
					func() error { return sendEnd(stream, x.rows) })
				if err != nil {
					// The status has the cause, and comes soon if the server has seen it.
					time.AfterFunc(2*time.Second, cancel)
				}
				moved <- err
			}()
		case *pb.ComputeStreamResponse_Chunk:
			chunk := message.Chunk
			results[chunk.Matrix].setBytes(chunk.Index, chunk.GetData())
		case *pb.ComputeStreamResponse_Receipt:
			receipt = message.Receipt
		}
	}
}

// openIfOffered returns nil if the elements go in messages.
func openIfOffered(server string, access *pb.DirectAccess, connections int32) []connection {
	if connections == 0 {
		return nil
	}
	if access == nil {
		fmt.Println("the server has no direct connections")
		return nil
	}
	opened, err := openConnections(server, access)
	if err != nil {
		fmt.Println("no direct connections:", err)
	}
	return opened
}

// sendOperands sends W, then X and dY row block by row block, then End. It returns early
// if the call has ended.
func sendOperands(stream pb.GradientService_ComputeStreamClient, blockRows int64, x, w, dy matrix) {
	if sendRows(stream, pb.Matrix_MATRIX_W, w, 0, w.rows) != nil {
		return
	}
	for first := 0; first < x.rows; first += int(blockRows) {
		last := first + int(blockRows)
		if last > x.rows {
			last = x.rows
		}
		if sendRows(stream, pb.Matrix_MATRIX_X, x, first, last) != nil {
			return
		}
		if sendRows(stream, pb.Matrix_MATRIX_DY, dy, first, last) != nil {
			return
		}
	}
	sendEnd(stream, x.rows)
}

func sendEnd(stream pb.GradientService_ComputeStreamClient, m int) error {
	end := &pb.End{M: int64(m)}
	if err := stream.Send(&pb.ComputeStreamRequest{Message: &pb.ComputeStreamRequest_End{End: end}}); err != nil {
		return err
	}
	return stream.CloseSend()
}

func sendRows(stream pb.GradientService_ComputeStreamClient, name pb.Matrix, of matrix, first, last int) error {
	data := of.bytes(first, last)
	for at := 0; at < len(data); at += 4 * chunkElements {
		end := at + 4*chunkElements
		if end > len(data) {
			end = len(data)
		}
		chunk := &pb.Chunk{
			Matrix: name, Index: int64(first*of.columns + at/4),
			Payload: &pb.Chunk_Data{Data: data[at:end]},
		}
		if err := stream.Send(&pb.ComputeStreamRequest{Message: &pb.ComputeStreamRequest_Chunk{Chunk: chunk}}); err != nil {
			return err
		}
	}
	return nil
}

// wholeNumbers fills a matrix with numbers of which every sum below is exact.
func wholeNumbers(rows, columns, seed int) matrix {
	result := newMatrix(rows, columns)
	for i := range result.elements {
		result.elements[i] = float32((i*7+i/columns*3+seed)%5 - 2)
	}
	return result
}

// right compares all results with products computed here.
func right(x, w, dy, y, dx, dw matrix) bool {
	m, n, k := x.rows, x.columns, w.columns
	expected := newMatrix(n, k)
	for i := 0; i < m; i++ {
		for j := 0; j < k; j++ {
			var sum float32
			for l := 0; l < n; l++ {
				sum += x.elements[i*n+l] * w.elements[l*k+j]
				expected.elements[l*k+j] += x.elements[i*n+l] * dy.elements[i*k+j]
			}
			if sum != y.elements[i*k+j] {
				return false
			}
		}
		for l := 0; l < n; l++ {
			var sum float32
			for j := 0; j < k; j++ {
				sum += dy.elements[i*k+j] * w.elements[l*k+j]
			}
			if sum != dx.elements[i*n+l] {
				return false
			}
		}
	}
	for i, element := range expected.elements {
		if element != dw.elements[i] {
			return false
		}
	}
	return true
}

func must(right bool, what string) {
	if !right {
		log.Fatalln("wrong results:", what)
	}
	fmt.Println("right results:", what)
}

func main() {
	direct := flag.Bool("direct", false, "send the larger job on direct connections")
	flag.Parse()
	if flag.NArg() != 1 {
		log.Fatalln("usage: client [-direct] HOST:PORT")
	}
	server := flag.Arg(0)
	var connections int32
	if *direct {
		connections = 2
	}
	connection, err := grpc.Dial(server, grpc.WithInsecure())
	if err != nil {
		log.Fatalln(err)
	}
	defer connection.Close()
	stub := pb.NewGradientServiceClient(connection)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()

	x, w, dy := wholeNumbers(300, 200, 1), wholeNumbers(200, 100, 2), wholeNumbers(300, 100, 3)
	y, dx, dw, err := compute(ctx, stub, x, w, dy)
	if err != nil {
		log.Fatalln(err)
	}
	must(right(x, w, dy, y, dx, dw), "Compute, 300 x 200 x 100")

	x, w, dy = wholeNumbers(8192, 256, 1), wholeNumbers(256, 128, 2), wholeNumbers(8192, 128, 3)
	started := time.Now()
	y, dx, dw, receipt, err := computeStream(ctx, server, stub, x, w, dy, 1024, connections)
	took := time.Since(started)
	if err != nil {
		log.Fatalln(err)
	}
	must(right(x, w, dy, y, dx, dw), fmt.Sprintf("ComputeStream, 8192 x 256 x 128 in %d row blocks over %s, %v",
		receipt.Blocks, receipt.Transport, took.Round(time.Millisecond)))

	_, err = stub.Compute(ctx, &pb.ComputeRequest{Job: header(1, -1, 1)})
	for _, detail := range status.Convert(err).Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			fmt.Println("a job of -1 columns is refused:", info.Reason)
			return
		}
	}
	log.Fatalln("a job of -1 columns should be refused with details, not with", err)
}
